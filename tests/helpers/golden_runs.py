"""Tiny trainings whose losses are kept, step by step, in tests/golden.

python tests/helpers/golden_runs.py write                  # keep the losses of the code as it is now
python tests/helpers/golden_runs.py modules RUN FILE       # what each module of a run gives, call by call
python tests/helpers/golden_runs.py part FILE OTHER        # the first module at which two revisions part
"""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import FUSIONS, tiny_dataset, tiny_recipe

import finetune

FOLDER = Path(__file__).parents[1] / "golden"
CALLS = 2000  # of modules that are recorded
ONE_STAGE = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5e-3, "epochs": 2}]


def questions(folder: Path) -> dict[str, Any]:
    """Three questions about each picture, with answers of uneven lengths."""
    data = tiny_dataset(folder / "data")
    for split in ("train", "test"):
        with (data / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        with (data / f"{split}-asked.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "question", "answer"])
            for row in rows:
                label = row["label"]
                for question, answer in (("What is this?", f"a {label} square"), ("Describe", label), ("is?", "a red")):
                    writer.writerow([row["image"], question, answer])
    asked = [
        {
            "path": str(data / f"{split}-asked.csv"),
            "task": {"kind": "vqa"},
            "columns": {"answers": "answer"},
            "split": split,
        }
        for split in ("train", "test")
    ]
    rows = {"train__stages": ONE_STAGE, "train__tokens_per_batch": 256}
    return {"data": asked, "model__projectors": {"image": {"kind": "mlp"}}, **rows}  # a picture of 16 tokens


def labels(folder: Path) -> dict[str, Any]:
    data = tiny_dataset(folder / "data")
    task = {"kind": "classify"}
    sources = [
        {"path": str(data / f"{split}.csv"), "task": task, "head": "label", "split": split}
        for split in ("train", "test")
    ]
    stage = ONE_STAGE[0] | {"trains": ["projectors", "adapter", "heads"]}
    return {"data": sources, "train__stages": [stage]}


def sounds(folder: Path) -> dict[str, Any]:
    from trained_runs import media_recipe

    recipe = json.loads(media_recipe(folder, "prefix", {"train": 4, "test": 4}).read_text())
    recipe["train"]["stages"] = [stage | {"epochs": 2} for stage in recipe["train"]["stages"]]
    return {"model": recipe["model"], "data": recipe["data"], "train": recipe["train"] | {"share_prefixes": False}}


def crossing(folder: Path) -> dict[str, Any]:
    stage = ONE_STAGE[0] | {"trains": ["projectors", "fusion", "adapter"]}
    return {"model__fusion": {"kind": "cross_attention", **FUSIONS["cross_attention"]}, "train__stages": [stage]}


RUNS = {
    "two-stages": lambda folder: {},
    "shared-prefixes": questions,
    "label-head": labels,
    "sounds-and-pictures": sounds,
    "cross-attention": crossing,
    "padded": lambda folder: questions(folder) | {"model__llm": {"name": str(folder / "bloom"), "quantize": "none"}},
}


def losses(name: str, folder: Path) -> dict[str, list[float]]:
    """{stage: the loss of each step} of a run that is trained here."""
    if name == "padded":
        from tiny import tiny_llm_folder

        tiny_llm_folder(folder / "bloom", "bloom", n_head=4)
    recipe = tiny_recipe(folder, **RUNS[name](folder))
    run = finetune.train(recipe, folder / "run")
    stages = json.loads((run.path / "metrics.json").read_text())["train"]["stages"]
    return {stage: result["losses"] for stage, result in stages.items()}


def kept(name: str) -> dict[str, list[float]]:
    result: dict[str, list[float]] = json.loads((FOLDER / f"{name}.json").read_text())
    return result


@contextmanager
def recorded() -> Iterator[list[tuple[str, list[int], float]]]:
    """What each module gives, call by call: its name in the outermost module that is called, shape, norm."""
    calls: list[tuple[str, list[int], float]] = []
    names: dict[torch.nn.Module, str] = {}

    def enter(module: torch.nn.Module, arguments: Any) -> None:
        if module not in names:
            of = type(module).__name__
            names.update((one, f"{of}.{name}" if name else of) for name, one in module.named_modules())

    def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and len(calls) < CALLS:
            calls.append((names[module], list(tensor.shape), float(tensor.detach().double().norm())))

    modules = torch.nn.modules.module
    with modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(hook):
        yield calls


def record_modules(name: str, file: Path) -> None:
    with recorded() as calls, tempfile.TemporaryDirectory() as folder:
        losses(name, Path(folder))
    file.write_text(json.dumps(calls))


def part(one: Path, other: Path) -> str:
    """Where two recordings of a run part."""
    calls = list(zip(json.loads(one.read_text()), json.loads(other.read_text()), strict=False))
    for number, ((module, shape, norm), (other_module, other_shape, other_norm)) in enumerate(calls):
        if (module, shape) != (other_module, other_shape) or abs(norm - other_norm) > 1e-5 * abs(norm):
            return f"call {number}: {module} {shape} of norm {norm} | {other_module} {other_shape} of norm {other_norm}"
    return f"{len(calls)} calls are equal"


def main(command: str, *arguments: str) -> None:
    if command == "modules":
        record_modules(arguments[0], Path(arguments[1]))
    elif command == "part":
        print(part(Path(arguments[0]), Path(arguments[1])))
    else:
        FOLDER.mkdir(exist_ok=True)
        for name in arguments or RUNS:
            with tempfile.TemporaryDirectory() as folder:
                (FOLDER / f"{name}.json").write_text(json.dumps(losses(name, Path(folder)), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
