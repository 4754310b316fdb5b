"""One process of the comparison with trl: `benchmarks.train_vs_trl` over the large LLM."""

import json
import os
import shutil
from importlib.util import find_spec

import torch

from benchmarks.gpu.checks import Skipped
from benchmarks.gpu.setting import Setting
from benchmarks.train_vs_trl import ours, peer
from benchmarks.train_vs_trl.options import Options
from benchmarks.train_vs_trl.prepare import write_all

PICTURES = {1: 128, 5: 48}  # by questions a picture
LARGE_GPU = 100e9  # bytes: from there on steps are larger


def check(setting: Setting, questions: str, kind: str) -> str:
    """`kind`: `prepare`, or the name of a run."""
    folder = setting.folder / f"questions-{questions}"
    if kind == "prepare":
        options = options_of(setting, int(questions))
        options.save()
        facts = write_all(options)
        assert facts["row_kind"] == "shared", f"rows of this LLM are {facts['row_kind']}, not shared"
        (folder / "prepare.json").write_text(json.dumps(facts), encoding="utf-8")
        (low, _, high), tokens = facts["lengths"], {side: f"{facts[side]['tokens']:,}" for side in ("ours", "peer")}
        return (
            f"{facts['samples']} samples of {low} to {high} tokens, {facts['steps']} steps; of {tokens['peer']} tokens "
            f"ours reads {tokens['ours']}"
        )
    refuse_missing(kind, setting.device)
    found = (ours if kind.startswith("ours") else peer).train(Options.load(folder), kind)
    (folder / f"{kind}.json").write_text(json.dumps(found), encoding="utf-8")
    samples = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))["samples"]
    memory = found["memory"]
    return (
        f"{samples / found['seconds']:.2f} samples/s, {1000 * found['step_seconds']:,.0f} ms a step, peak "
        f"{memory['process'] / 2**30:.2f} GiB, {memory['above'] / 2**30:.2f} above the weights; loss "
        f"{found['losses'][0]:.2f} to {found['losses'][-1]:.2f}"
    )


def options_of(setting: Setting, questions: int) -> Options:
    """With links to the weights in its folder."""
    folder = setting.folder / f"questions-{questions}"
    folder.mkdir()
    for name in ("llm", "vision"):
        (folder / name).symlink_to(setting.folder / name)
    on_gpu = setting.device == "cuda"
    large = on_gpu and torch.cuda.get_device_properties(0).total_memory > LARGE_GPU
    return Options(
        workload="questions",
        folder=folder,
        questions=questions,
        pictures=2 if setting.toy else PICTURES[questions],
        pixels=None,
        epochs=2,
        tokens_per_batch=256 if setting.toy else 8192 if large else 2048,
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
    """Raises Skipped where a run of this kind needs what isn't here."""
    if kind in ("ours-liger", "peer-plain") and (device == "cpu" or find_spec("liger_kernel") is None):
        raise Skipped("liger-kernel isn't installed" if device == "cuda" else "Liger's kernels need a GPU")
    if "compiled" in kind and device == "cuda":
        missing = [name for name in ("triton",) if find_spec(name) is None]
        missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
        if missing:
            raise Skipped(f"compiling needs {' and '.join(missing)}")
