"""One run of the comparison with trl: `benchmarks.train_vs_trl` over the large LLM, which a process loads once."""

import json
import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory

from benchmarks.gpu.checks import Skipped
from benchmarks.gpu.setting import Setting
from benchmarks.train_vs_trl import ours, peer
from benchmarks.train_vs_trl.options import Options
from benchmarks.train_vs_trl.prepare import write_all
from finetune.model.language_model import default_device, load_language_model, resolve_dtype
from finetune.recipe.schema import Llm

PICTURES = {1: 64, 5: 40}  # by questions a picture
# Tokens computed at once, by bytes of the GPU: without activation checkpoints each takes about 9 MB, and a picture with
# a question about 600 tokens.
TOKENS = {100e9: 8192, 40e9: 2048, 20e9: 1024, 0: 640}


def check(setting: Setting, questions: str, kind: str) -> str:
    """`kind`: `prepare`, or the name of a run."""
    folder = setting.folder / f"questions-{questions}"
    refuse_missing(kind, setting.device)
    release_memory()
    llm = language_model(setting.folder / "llm")
    if kind == "prepare":
        options = options_of(setting, int(questions))
        options.save()
        facts = write_all(options, llm)
        assert facts["row_kind"] == "shared", f"rows of this LLM are {facts['row_kind']}, not shared"
        (folder / "prepare.json").write_text(json.dumps(facts), encoding="utf-8")
        (low, _, high), tokens = facts["lengths"], {side: f"{facts[side]['tokens']:,}" for side in ("ours", "peer")}
        return (
            f"{facts['samples']} samples of {low} to {high} tokens, {facts['steps']} steps; of {tokens['peer']} tokens "
            f"ours reads {tokens['ours']}"
        )
    found = (ours if kind.startswith("ours") else peer).train(Options.load(folder), kind, llm)
    (folder / f"{kind}.json").write_text(json.dumps(found), encoding="utf-8")
    samples = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))["samples"]
    memory = found["memory"]
    return (
        f"{samples / found['seconds']:.2f} samples/s, {1000 * found['step_seconds']:,.0f} ms a step, peak "
        f"{memory['process'] / 2**30:.2f} GiB, {memory['above'] / 2**30:.2f} above the weights; loss "
        f"{found['losses'][0]:.2f} to {found['losses'][-1]:.2f}"
    )


@cache
def language_model(folder: Path) -> Any:
    device = default_device()
    return load_language_model(Llm(name=str(folder)), resolve_dtype("auto", device), device)


def options_of(setting: Setting, questions: int) -> Options:
    """With links to the weights in its folder."""
    folder = setting.folder / f"questions-{questions}"
    folder.mkdir()
    for name in ("llm", "vision"):
        (folder / name).symlink_to(setting.folder / name)
    on_gpu = setting.device == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    tokens = 256 if setting.toy else next(tokens for bytes, tokens in TOKENS.items() if memory >= bytes)
    return Options(
        workload="questions",
        folder=folder,
        questions=questions,
        pictures=2 if setting.toy else PICTURES[questions],
        pixels=None,
        epochs=2,
        tokens_per_batch=tokens,
        peer_tokens=tokens // 2 if setting.toy else tokens,  # a toy's steps are accumulated too
        parts="given",
        device=setting.device,
        threads=len(os.sched_getaffinity(0)),
        workers=2 if on_gpu else 0,
        quantize="nf4",
        rank=4 if setting.toy else 16,
        learning_rate=5e-4,
        seed=7,
    )


def refuse_missing(kind: str, device: str) -> None:
    """Raises Skipped where a run of this kind needs what isn't here. On a CPU nothing is needed: there Liger's kernels
    are left out, and compiled layers only traced.
    """
    if device == "cpu":
        return
    if kind in ("ours-liger", "peer-plain") and find_spec("liger_kernel") is None:
        raise Skipped("liger-kernel isn't installed")
    if "compiled" in kind:
        missing = ["triton"] if find_spec("triton") is None else []
        missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
        if missing:
            raise Skipped(f"compiling needs {' and '.join(missing)}")
