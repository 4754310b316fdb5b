"""What `finetune plan` says beside what a step really takes: python benchmarks/plan_accuracy.py

Each pair of a recipe and a shape is planned from configs, and then run: the same trainer takes the same step over
models with random weights, its tensors counted as they come and go. `taken` is what the real step adds to the weights:
gradients, activations and the optimizer's state; `process` is by how much resident memory grows meanwhile, which has
more in it: work space within an operation, which no tensor shows, and holes between blocks of memory. With --gpu, the
peak of torch's allocator, weights and all, stands in its place. Every pair has a process of its own.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32, "num_attention_heads": 8}
ONE_STAGE = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 1.0e-3}]
WITH_FUSION = [{"name": "tune", "trains": ["projectors", "fusion", "adapter"], "learning_rate": 1.0e-3}]
WITH_ENCODER = [{"name": "tune", "trains": ["projectors", "encoders.image", "adapter"], "learning_rate": 1.0e-3}]
WITH_HEAD = [{"name": "tune", "trains": ["projectors", "adapter", "heads"], "learning_rate": 1.0e-3}]
ALIGN = [{"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-3}]


@dataclass(frozen=True)
class Pair:
    """A recipe (`changes`: dotted keys of the tests' tiny one, __ for dots) over an LLM of a shape; or that of a family
    of the tests' existing models as its base, with `overrides`.
    """

    family: str = "llama"
    shape: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    base: str | None = None
    overrides: tuple[str, ...] = ()


PAIRS: dict[str, Pair] = {
    "tiny, second stage": Pair(),
    "nf4": Pair(shape=SMALL, changes={"model__llm__quantize": "nf4", "train__stages": ONE_STAGE}),
    "int8": Pair(shape=SMALL, changes={"model__llm__quantize": "int8", "train__stages": ONE_STAGE}),
    "projectors alone": Pair(shape=SMALL, changes={"train__stages": ALIGN}),
    "checkpoints": Pair(shape=SMALL, changes={"train__checkpoint_every_n_layers": 1, "train__stages": ONE_STAGE}),
    "two rows a step": Pair(shape=SMALL, changes={"train__accumulate": 2, "train__stages": ONE_STAGE}),
    "long row": Pair(shape=SMALL, changes={"train__tokens_per_batch": 512, "train__stages": ONE_STAGE}),
    "qwen3, resampler": Pair(
        family="qwen3",
        shape=SMALL,
        changes={"model__projectors__image": {"kind": "resampler"}, "train__stages": ONE_STAGE},
    ),
    "gemma2, eager": Pair(
        family="gemma2", shape=SMALL, changes={"model__llm__attention": "eager", "train__stages": ONE_STAGE}
    ),
    "cross-attention": Pair(shape=SMALL, changes={"model__fusion": "cross_attention", "train__stages": WITH_FUSION}),
    "encoder with LoRA": Pair(
        shape=SMALL,
        changes={"train__cache": False, "tune_encoders": {"image": {"rank": 4}}, "train__stages": WITH_ENCODER},
    ),
    "head of labels": Pair(shape=SMALL, changes={"train__stages": WITH_HEAD}, head="label"),
    "base": Pair(base="gemma3"),
    "base in nf4, projectors": Pair(
        base="qwen2_5_vl",
        overrides=(
            "model.base.quantize=nf4",
            "train.cache=false",
            "train.stages.0.trains=[adapter, projectors]",
        ),
    ),
}


def recipe_of(pair: Pair, folder: Path) -> Any:
    """The recipe, over models with random weights in `folder`."""
    from tiny import tiny_dataset, tiny_llm_folder, tiny_recipe, tiny_vision_folder

    from finetune.recipe.load import load_recipe

    if pair.base:
        from families import ZOO, family_folder
        from families.recipes import base_recipe

        base = folder / "base"
        if not base.is_dir():
            family_folder(pair.base, base)
        return load_recipe(base_recipe(folder, ZOO[pair.base], base, "image"), list(pair.overrides))
    if not (folder / "llm").is_dir():
        tiny_llm_folder(folder / "llm", pair.family, **pair.shape)
        tiny_vision_folder(folder / "encoder")
        tiny_dataset(folder / "data", train=40)
    path = tiny_recipe(folder, **pair.changes)
    if pair.head:
        content = json.loads(path.read_text())
        for source in content["data"]:
            source["head"] = pair.head
        path.write_text(json.dumps(content))
    return load_recipe(path)


def planned(pair: Pair, folder: Path, gpu: bool) -> dict[str, int]:
    """Bytes by part of the last stage's step, from configs alone."""
    from finetune.common.progress import quiet_libraries
    from finetune.training.plan.measure import measure
    from finetune.training.plan.rows import PlannedRows

    quiet_libraries()
    recipe = recipe_of(pair, folder).with_dtype("bfloat16" if gpu else "float32")
    measured = measure(recipe, PlannedRows.of(recipe), gpu)
    return next(phase for phase in reversed(measured.phases) if phase.name.startswith("train")).parts


def real(pair: Pair, folder: Path, gpu: bool) -> tuple[dict[str, int], int, int]:
    """The same of a step that is taken for real; and bytes that the process, and a GPU's allocator, grew by."""
    import torch

    from finetune.common.progress import quiet_libraries
    from finetune.model.build import load_components, load_llm
    from finetune.model.features import Features
    from finetune.model.row_layout import likely_layout
    from finetune.training.plan.measure import step_of
    from finetune.training.plan.meter import Meter
    from finetune.training.plan.rows import PlannedRows, PlannedRun
    from finetune.training.train import set_up

    quiet_libraries()
    recipe = recipe_of(pair, folder).with_dtype("bfloat16" if gpu else "float32")
    rows = PlannedRows.of(recipe)
    run = PlannedRun(recipe, rows)  # for the same rows
    components = load_components(recipe.model, recipe.tune_encoders, recipe.seed)
    run.run.components, run.run.features = components, Features(components.encoders, None, recipe.media)
    meter = Meter()
    with meter:
        model = run.run.build(with_encoders=not recipe.train.cache, language_model=load_llm(components))
        set_up(model, recipe.train)
    stage = recipe.train.stages[-1]
    kind = likely_layout(model.causal_lm, by_segments=recipe.model.language_model.attention == "auto").kind
    training, batch, _ = step_of(run, model, stage, kind, recipe.seed + 1000 * (len(recipe.train.stages) - 1))
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with meter:  # once before, so that what libraries load at first isn't counted
        measure_with(training, batch, meter, gpu)
    model.zero_grad()
    gc.collect()
    with watched() as grown, meter:
        memory = measure_with(training, batch, meter, gpu)
    allocated = torch.cuda.max_memory_allocated() if gpu else 0
    parts = {**memory.weights, "optimizer": memory.optimizer, "gradients": memory.gradients}
    return {**parts, "activations": memory.activations}, grown[0], allocated


def measure_with(training: Any, batch: Any, meter: Any, gpu: bool) -> Any:
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    from finetune.training.plan.step import measure_step

    if gpu:
        batch = tree_map_only(Tensor, lambda tensor: tensor.cuda(), batch)
    return measure_step(training, batch, meter, gpu)


@contextmanager
def watched() -> Iterator[list[int]]:
    """The bytes by which the process's resident memory is larger at its peak than before (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, so that it is counted when taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    grown = [0]
    before = resident("VmRSS")
    yield grown
    grown[0] = resident("VmHWM") - before


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def compare(name: str, gpu: bool = False) -> dict[str, Any]:
    """{part: (planned, real)} in bytes, and the process's growth."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = planned(PAIRS[name], folder, gpu)
        found, grown, allocated = real(PAIRS[name], folder, gpu)
    both = {part: (parts.get(part, 0), found.get(part, 0)) for part in {**parts, **found}}
    return {"parts": both, "process": grown, "allocated": allocated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--gpu", action="store_true", help="in bfloat16, on this machine's GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(compare(arguments.only, arguments.gpu)))
        return
    results = {}
    print(f"{'pair':<20} {'planned':>9} {'real':>9} {'worst part':>24}   {'taken':>8} {'process':>8}   MiB")
    for name in PAIRS:
        command = [sys.executable, __file__, "--only", name, *(["--gpu"] if arguments.gpu else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = result = json.loads(done.stdout.splitlines()[-1])
        parts = result["parts"]
        totals = [sum(both[side] for both in parts.values()) / 2**20 for side in (0, 1)]
        off = {part: (plan - real) / real if real else float(plan > 0) for part, (plan, real) in parts.items()}
        worst = max(off, key=lambda part: abs(off[part]))
        step = sum(parts[part][1] for part in ("gradients", "activations", "optimizer")) / 2**20
        grown = (result["allocated"] or result["process"]) / 2**20
        print(
            f"{name:<20} {totals[0]:>9.1f} {totals[1]:>9.1f} {f'{worst} {off[worst]:+.1%}':>24}   "
            f"{step:>8.1f} {grown:>8.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
