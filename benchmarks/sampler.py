"""A group's answers by transformers' `generate` and by a vLLM server, in turns in one run, on the quickstart's weights.

    FINETUNE_VLLM=/opt/vllm/bin/python python benchmarks/sampler.py --questions 4 --answers 8 --tokens 32 --rounds 3

Both sample what a stage with `objective: grpo` would, from one model with LoRA that isn't zero, to questions about
pictures. `equal`: greedy answers of both that are the same. The start of the server isn't in the seconds.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from finetune.common.run_folder import RunFolder
from finetune.data.sample import Medium, Message
from finetune.model.assistant import FileView
from finetune.model.run import Run
from finetune.recipe.load import load_recipe
from finetune.training.rollouts import policy_sampler
from finetune.training.vllm_sampler import VllmSampler

ROOT = Path(__file__).resolve().parents[1]
GREEDY = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="to each question")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(chosen, Path(folder))


def compare(chosen: argparse.Namespace, folder: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"model.llm.quantize={chosen.quantize}"])
    run = Run.load(RunFolder(folder), recipe, {})
    model = run.build(with_encoders=True).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    assistant = run.assistant(model)
    view = FileView(assistant.encoders, assistant.limits)
    questions = questions_of(chosen.questions)
    longest = max(map(len, assistant.embedded(questions, view))) + chosen.tokens
    vllm = VllmSampler(assistant, view, longest, folder / "vllm")
    samplers = {"transformers": policy_sampler(assistant, view), "vllm": vllm}
    try:
        greedy = {name: sampler(questions, options_of(chosen, GREEDY), 0) for name, sampler in samplers.items()}
        pairs = [
            (one.tokens, other.tokens)
            for own, others in zip(*greedy.values(), strict=True)
            for one, other in zip(own, others, strict=True)
        ]
        seconds: dict[str, list[float]] = {name: [] for name in samplers}
        for number in range(chosen.rounds):
            for name, sampler in samplers.items():
                taken, tokens = timed(
                    lambda sampler=sampler, number=number: sampler(questions, options_of(chosen, 1.0), number)
                )
                seconds[name].append(taken)
                print(f"round {number + 1}: {name} {taken:.2f} s, {tokens} tokens", flush=True)
    finally:
        vllm.close()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads")
    print(f"{len(questions)} questions, {chosen.answers} answers of up to {chosen.tokens} tokens to each")
    print(f"median: transformers {middle['transformers']:.2f} s, vllm {middle['vllm']:.2f} s")
    print(f"transformers by vllm: {middle['transformers'] / middle['vllm']:.2f}")
    print(f"equal greedy answers: {sum(one == other for one, other in pairs)} of {len(pairs)}")


def options_of(chosen: argparse.Namespace, temperature: float) -> SimpleNamespace:
    return SimpleNamespace(
        answers=chosen.answers, temperature=temperature, max_new_tokens=chosen.tokens, sampler_memory=0.4
    )


def questions_of(count: int) -> list[list[Message]]:
    folder = ROOT / "recipes/data/emoji"
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        pictures = [folder / row["image"] for row in csv.DictReader(file)][:count]
    return [[Message("user", (Medium("image", path), "图片里是什么？请详细介绍。"))] for path in pictures]


def timed(sample: Callable[[], list[list]]) -> tuple[float, int]:
    begin = time.perf_counter()
    drawn = sample()
    return time.perf_counter() - begin, sum(len(one.tokens) for own in drawn for one in own)


if __name__ == "__main__":
    main()
