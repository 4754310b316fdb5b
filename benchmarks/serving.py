"""Serve the same merged model with several servers and compare: requests a second, and how long each takes.

    python benchmarks/serving.py                          # a small model made now: MiniMind2-Small, a random SigLIP
    python benchmarks/serving.py --vllm /opt/vllm/bin/python
    python benchmarks/serving.py --model runs/NAME        # a model of yours that the native class holds exactly

ours          `finetune serve` on the merged folder
transformers  `transformers serve` on what `finetune export --to transformers` made of it
vllm          vLLM's server on what `finetune export --to vllm` made of it, where `--vllm` names a python that has it;
              `--enforce-eager`: compiling takes minutes on a CPU

Each server runs alone, in a process of its own with the same threads, and answers the same requests in the same order:
greedily, at most 32 tokens, three of four with a picture that none of the other requests has, one of text alone. At
first one request warms it up. Then 1, 8 and 32 clients send one request after another, each waiting for its answer.
Latency is from sending to having all of an answer. `equal`: answers that are ours, letter for letter.
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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def main() -> None:
    arguments = parse_arguments()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = arguments.model or made(folder)
        questions = list(requests(sum(arguments.requests) + 1, arguments.tokens))
        found: dict[str, Any] = {}
        for name in arguments.servers:
            started = SERVERS[name](model, folder, arguments)
            if started is None:
                continue
            command, called = started
            with serving(command, folder / f"{name}.log") as url:
                found[name] = measured(url, called, questions, arguments)
            print(f"{name}: {[figures['requests_per_second'] for figures in found[name]['clients']]}", file=sys.stderr)
        texts = [result.pop("texts") for result in found.values()]
        for result, said in zip(found.values(), texts, strict=True):
            result["equal"] = sum(a == b for a, b in zip(said, texts[0], strict=True))
    report(found, len(questions), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


def made(folder: Path) -> Path:
    """A run with a merged model: a few steps of training, so that it is what the kit makes of weights like these."""
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


# Each gives a command, PORT for its port, and what the model is called there.


def ours(model: Path, folder: Path, arguments: argparse.Namespace) -> tuple[list[str], str]:
    finetune = [sys.executable, "-m", "finetune.commands.cli", "serve", f"model={model}", "--port", "PORT"]
    return [*finetune, "--option", "max_batch=32"], "model"


def transformers_serve(model: Path, folder: Path, arguments: argparse.Namespace) -> tuple[list[str], str]:
    os.environ["HF_HOME"] = str(folder / "hub")
    (folder / "hub" / "hub").mkdir(parents=True, exist_ok=True)  # its list of models wants one
    program = Path(sys.executable).with_name("transformers")
    native = exported(model, folder, "transformers")
    options = ["--port", "PORT", "--dtype", "float32", "--device", "cpu"]
    return [str(program), "serve", str(native), *options], str(native)


def vllm_serve(model: Path, folder: Path, arguments: argparse.Namespace) -> tuple[list[str], str] | None:
    if not arguments.vllm:
        return None
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["PATH"] = f"{Path(arguments.vllm).parent}{os.pathsep}{os.environ['PATH']}"
    native = exported(model, folder, "vllm")
    serve = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(native), "--port", "PORT"]
    return [
        *serve,
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--enforce-eager",
        "--served-model-name",
        "model",
    ], "model"


SERVERS = {"ours": ours, "transformers": transformers_serve, "vllm": vllm_serve}


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """The base URL of a server that answers; it is stopped, with all that it started, at the end."""
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
            while not answers(f"{url}/health"):
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


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def requests(count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Bodies of chat completions, but for the model's name: no picture comes twice."""
    pictures = [row["image"] for name in ("test", "train") for row in csv.DictReader((PICTURES / f"{name}.csv").open())]
    for number in range(count):
        content: Any = f"{number}. {TEXTS[number % len(TEXTS)]}"
        if number % 4 != 3:
            picture = base64.b64encode((PICTURES / pictures[number]).read_bytes()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
            ]
        yield {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}


def measured(url: str, name: str, questions: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of each number of clients, and all answers."""
    ask(url, name, questions[0])
    texts, clients, start = [], [], 1
    for count, number in zip(arguments.clients, arguments.requests, strict=True):
        replies, seconds = crowd(url, name, questions[start : start + number], count)
        texts += [text for text, _, _ in replies]
        took = sorted(seconds for _, _, seconds in replies)
        clients.append(
            {
                "clients": count,
                "requests_per_second": number / seconds,
                "tokens_per_second": sum(tokens for _, tokens, _ in replies) / seconds,
                "p50_seconds": statistics.median(took),
                "p95_seconds": took[min(len(took) - 1, round(0.95 * len(took)))],
            }
        )
        start += number
    return {"clients": clients, "texts": texts}


def crowd(url: str, name: str, questions: Sequence[dict[str, Any]], clients: int) -> tuple[list[Any], float]:
    """Each of the clients sends one question after another; (text, tokens, seconds) of each, and seconds of all."""
    found: list[Any] = [None] * len(questions)
    left = iter(range(len(questions)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            begin = time.perf_counter()
            text, tokens = ask(url, name, questions[number])
            found[number] = (text, tokens, time.perf_counter() - begin)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - begin


def ask(url: str, name: str, question: dict[str, Any]) -> tuple[str, int]:
    body = json.dumps({**question, "model": name}).encode()
    wanted = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(wanted, timeout=600) as reply:
            said = json.load(reply)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answers {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    return said["choices"][0]["message"]["content"].strip(), said["usage"]["completion_tokens"]


def report(found: dict[str, Any], count: int, arguments: argparse.Namespace) -> None:
    versions = {name: version(name) for name in ("finetune", "torch", "transformers")}
    if arguments.vllm and "vllm" in found:
        code = "import importlib.metadata as m; print(next(d.version for d in m.distributions() if 'vllm' in d.name))"
        versions["vllm"] = subprocess.run([arguments.vllm, "-c", code], capture_output=True, text=True).stdout.strip()
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"\n{told}; Python {platform.python_version()}; {arguments.threads} threads of {processor()}\n")
    print("| server | clients | requests/s | tokens/s | p50 (s) | p95 (s) | equal |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, result in found.items():
        for figures in result["clients"]:
            print(
                f"| {name} | {figures['clients']} | {figures['requests_per_second']:.2f} "
                f"| {figures['tokens_per_second']:.0f} | {figures['p50_seconds']:.2f} | {figures['p95_seconds']:.2f} "
                f"| {result['equal']} of {count - 1} |"
            )
    if {"ours", "transformers"} <= found.keys():
        pairs = zip(found["ours"]["clients"], found["transformers"]["clients"], strict=True)
        ratios = [(a["clients"], a["requests_per_second"] / b["requests_per_second"]) for a, b in pairs]
        print("\nours beside transformers: " + ", ".join(f"{ratio:.1f}x at {clients}" for clients, ratio in ratios))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
