"""Serve the same merged model with several servers and compare requests per second and latency.

    python benchmarks/serving.py                          # a small model made now: MiniMind2-Small, a random SigLIP
    python benchmarks/serving.py --vllm /opt/vllm/bin/python
    python benchmarks/serving.py --model runs/NAME        # your model, if its native class represents it exactly

ours          `finetune serve` on the merged folder
transformers  `transformers serve` on the export to transformers
vllm          vLLM's server on the export to vLLM, if `--vllm` names a Python that has it; with `--enforce-eager`, since
              compiling takes minutes on a CPU

Each server runs alone, in its own process with the same number of threads, and gets the same requests in the same
order: greedy, at most 32 tokens, three of four with a picture that no other request has, one with text only. One
request warms the server up. Then 1, 8 and 32 clients send one request after another, each waiting for its answer.
Latency is from sending a request to the end of its answer. `equal`: answers identical to ours.
"""

import argparse
import base64
import csv
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypedDict

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "recipes/data/emoji"
LLM = ROOT / "weights/minimind2-small"
QUESTIONS = ("图片里是什么？请详细介绍。", "请描述这张图片，并讲一个故事。", "这是什么？它有什么用？")
TEXTS = ("请介绍一下北京。", "怎样做一杯好茶？", "讲一个关于月亮的故事。")
START_SECONDS = 300
SIGLIP = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="a run or a merged folder, instead of one made now")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--requests", type=int, nargs="+", default=[6, 16, 32], help="of these clients, in all")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a server (default: all cores)")
    parser.add_argument("--servers", nargs="+", default=["ours", "transformers", "vllm"], help="default: all there are")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if len(arguments.clients) != len(arguments.requests):
        parser.error("--requests: one number for each of --clients")
    return arguments


class Figures(TypedDict):
    """Of one server with one number of clients."""

    clients: int
    requests_per_second: float
    tokens_per_second: float
    p50_seconds: float
    p95_seconds: float


@dataclass
class Result:
    """Of one server: figures for each number of clients, and all answers."""

    figures: list[Figures]
    texts: list[str]


Body = dict[str, object]  # a chat completion request as JSON


def main() -> None:
    arguments = parse_arguments()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or small_model(folder)
        questions = list(requests(sum(arguments.requests) + 1, arguments.tokens))
        results: dict[str, Result] = {}
        for server in arguments.servers:
            command = SERVERS[server](model, folder, arguments)
            if command is None:
                continue
            with serving(command.words, folder / f"{server}.log") as url:
                results[server] = measure(url, command.model, questions, arguments)
            rates = [figures["requests_per_second"] for figures in results[server].figures]
            print(f"{server}: {rates}", file=sys.stderr)
    first = next(iter(results.values())).texts if results else []
    equal = {
        server: sum(a == b for a, b in zip(result.texts, first, strict=True)) for server, result in results.items()
    }
    report(results, equal, len(questions), arguments)
    if arguments.json:
        content = {server: {"clients": result.figures, "equal": equal[server]} for server, result in results.items()}
        arguments.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def small_model(folder: Path) -> Path:
    """A run with a merged model, trained for a few steps."""
    import torch
    import transformers

    import finetune

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**SIGLIP)
    transformers.SiglipVisionModel(config).save_pretrained(folder / "siglip")
    size = {"height": SIGLIP["image_size"], "width": SIGLIP["image_size"]}
    transformers.SiglipImageProcessor(size=size).save_pretrained(folder / "siglip")
    rows = list(csv.DictReader((PICTURES / "train.csv").open(encoding="utf-8")))[:32]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label"))
        writer.writerows((str(PICTURES / row["image"]), row["label"]) for row in rows)
    source = {"path": str(folder / "rows.csv"), "task": {"kind": "classify", "prompt": QUESTIONS[0]}}
    recipe = {
        "name": "serving",
        "model": {
            "llm": {"name": str(LLM), "quantize": "none"},
            "encoders": {"image": {"kind": "vision", "name": str(folder / "siglip")}},
            "projectors": {"image": {"kind": "mlp"}},
        },
        "adapter": {"rank": 4, "alpha": 8},
        "data": [{**source, "hold_out": 0.25, "outside_media_folder": True}],
        "train": {
            "tokens_per_batch": 512,
            "cache_folder": str(folder / "cache"),
            "stages": [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1e-5}],
        },
        "merge": {"rows": 4},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    finetune.train(finetune.load_recipe(folder / "recipe.yaml"), folder / "run")
    finetune.merge(folder / "run")
    return folder / "run"


def exported(model: Path, folder: Path, target: str) -> Path:
    import finetune

    finetune.export_run(model, target, folder / target, verify=False)
    return folder / target


@dataclass(frozen=True)
class Command:
    """Starts a server; PORT stands for its port. `model`: the model's name there."""

    words: Sequence[str]
    model: str


def ours(model: Path, folder: Path, arguments: argparse.Namespace) -> Command:
    finetune = [sys.executable, "-m", "finetune.commands.cli", "serve", f"model={model}", "--port", "PORT"]
    return Command([*finetune, "--option", "max_batch=32"], "model")


def transformers_serve(model: Path, folder: Path, arguments: argparse.Namespace) -> Command:
    os.environ["HF_HOME"] = str(folder / "hub")
    (folder / "hub" / "hub").mkdir(parents=True, exist_ok=True)  # it lists the models in there
    program = Path(sys.executable).with_name("transformers")
    native = exported(model, folder, "transformers")
    options = ["--port", "PORT", "--dtype", "float32", "--device", "cpu"]
    return Command([str(program), "serve", str(native), *options], str(native))


def vllm_serve(model: Path, folder: Path, arguments: argparse.Namespace) -> Command | None:
    if not arguments.vllm:
        return None
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["PATH"] = f"{Path(arguments.vllm).parent}{os.pathsep}{os.environ['PATH']}"
    native = exported(model, folder, "vllm")
    serve = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(native), "--port", "PORT"]
    options = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--served-model-name", "model"]
    return Command([*serve, *options], "model")


SERVERS = {"ours": ours, "transformers": transformers_serve, "vllm": vllm_serve}


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """The base URL of a running server; its process group is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(port) if word == "PORT" else word for word in command],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_healthy(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(command)} doesn't start:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def requests(count: int, tokens: int) -> Iterator[Body]:
    """Chat completion requests without the model's name; no picture is used twice."""
    pictures = [row["image"] for name in ("test", "train") for row in csv.DictReader((PICTURES / f"{name}.csv").open())]
    for number in range(count):
        content: object = f"{number}. {TEXTS[number % len(TEXTS)]}"
        if number % 4 != 3:
            picture = base64.b64encode((PICTURES / pictures[number]).read_bytes()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
            ]
        yield {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}


def measure(url: str, model: str, questions: Sequence[Body], arguments: argparse.Namespace) -> Result:
    ask(url, model, questions[0])
    result, start = Result([], []), 1
    for clients, number in zip(arguments.clients, arguments.requests, strict=True):
        replies, seconds = ask_concurrently(url, model, questions[start : start + number], clients)
        result.texts += [reply.text for reply in replies]
        latencies = sorted(reply.seconds for reply in replies)
        result.figures.append(
            {
                "clients": clients,
                "requests_per_second": number / seconds,
                "tokens_per_second": sum(reply.tokens for reply in replies) / seconds,
                "p50_seconds": statistics.median(latencies),
                "p95_seconds": latencies[min(len(latencies) - 1, round(0.95 * len(latencies)))],
            }
        )
        start += number
    return result


class Reply(NamedTuple):
    text: str
    tokens: int
    seconds: float


def ask_concurrently(url: str, model: str, questions: Sequence[Body], clients: int) -> tuple[list[Reply], float]:
    """All answers, in order, and the seconds that they took together; each client sends one question at a time."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda question: ask(url, model, question), questions))
    return replies, time.perf_counter() - begin


def ask(url: str, model: str, question: Body) -> Reply:
    body = json.dumps({**question, "model": model}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            content = json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answers {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    text, tokens = content["choices"][0]["message"]["content"].strip(), content["usage"]["completion_tokens"]
    return Reply(text, tokens, time.perf_counter() - begin)


def report(results: dict[str, Result], equal: dict[str, int], count: int, arguments: argparse.Namespace) -> None:
    versions = {name: version(name) for name in ("finetune-kit", "torch", "transformers")}
    if arguments.vllm and "vllm" in results:
        code = "import importlib.metadata as m; print(next(d.version for d in m.distributions() if 'vllm' in d.name))"
        versions["vllm"] = subprocess.run([arguments.vllm, "-c", code], capture_output=True, text=True).stdout.strip()
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"\n{names}; Python {platform.python_version()}; {arguments.threads} threads of {processor()}\n")
    print("| server | clients | requests/s | tokens/s | p50 (s) | p95 (s) | equal |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for server, result in results.items():
        for figures in result.figures:
            print(
                f"| {server} | {figures['clients']} | {figures['requests_per_second']:.2f} "
                f"| {figures['tokens_per_second']:.0f} | {figures['p50_seconds']:.2f} | {figures['p95_seconds']:.2f} "
                f"| {equal[server]} of {count - 1} |"
            )
    if {"ours", "transformers"} <= results.keys():
        pairs = zip(results["ours"].figures, results["transformers"].figures, strict=True)
        ratios = [(a["clients"], a["requests_per_second"] / b["requests_per_second"]) for a, b in pairs]
        print("\nours / transformers: " + ", ".join(f"{ratio:.1f}x with {clients}" for clients, ratio in ratios))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
