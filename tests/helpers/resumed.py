"""Tiny trainings whose every step is kept: what its checkpoint holds, and the rows that it learned from."""

import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # what a run imports late, once for all forks
import matplotlib.figure  # noqa: F401
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from golden_runs import questions
from safetensors.torch import load_file
from tiny import tiny_dataset, tiny_recipe
from tiny_encoders import tiny_audio_folder
from trained_runs import parts_by_medium, write_pictures_and_sounds, write_rows_of_every_head
from transformers.trainer_pt_utils import safe_globals

import finetune
from finetune.training.checkpoints import WholeCheckpoints
from finetune.training.trainer import StageTrainer

TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
SPLITS = ("train", "test")
SET = {"train__accumulate": 4, "train__save_every_n_steps": 1, "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1}}


def stages(
    epochs: int, *sources: list[int], first: dict[str, Any] | None = None, heads: bool = False
) -> list[dict[str, Any]]:
    """`align`, on the first of the sources, and `tune`, on the others."""
    align, tune = sources or (None, None)
    parts = ["projectors", "adapter", *(["heads"] if heads else [])]
    every = {"learning_rate": 5.0e-3, "epochs": epochs}
    both = [{"name": "align", "trains": ["projectors"], **(first or {})}, {"name": "tune", "trains": parts}]
    return [every | stage | ({"sources": own} if own else {}) for stage, own in zip(both, (align, tune), strict=True)]


def pictures(project: Path, epochs: int) -> Path:
    tiny_dataset(project / "data", train=20)
    return tiny_recipe(project, train__stages=stages(epochs), train__tokens_per_batch=64, **SET)


def sounds(project: Path, epochs: int) -> Path:
    tiny_audio_folder(project / "ears", "wav2vec2")
    write_pictures_and_sounds(project / "data", {"train": 34, "test": 4})
    task = {"kind": "classify", "media": ["audio"]}
    data = [{"path": str(project / "data" / f"sounds-{split}.csv"), "task": task, "split": split} for split in SPLITS]
    parts = parts_by_medium(project, "audio")
    return tiny_recipe(project, data=data, train__stages=stages(epochs), train__tokens_per_batch=96, **parts, **SET)


def two_media(project: Path, epochs: int) -> Path:
    tiny_audio_folder(project / "ears", "wav2vec2")
    write_pictures_and_sounds(project / "data", {"train": 12, "test": 4})
    media = {"pictures": ["image"], "sounds": ["audio"], "both": ["image", "audio"]}
    data = [
        {
            "name": name,
            "path": str(project / "data" / f"{name}-{split}.csv"),
            "split": split,
            "task": {"kind": "classify", "media": kinds, "prompt": f"{name}?"},
        }
        for split in SPLITS
        for name, kinds in media.items()
    ]
    parts = parts_by_medium(project, "image", "audio")
    tasks = stages(epochs, [0, 1], [0, 1, 2])
    return tiny_recipe(project, data=data, train__stages=tasks, train__tokens_per_batch=128, **parts, **SET)


def shared_prefixes(project: Path, epochs: int) -> Path:
    """Three questions about each picture."""
    asked = questions(project) | {"train__stages": stages(epochs), "train__tokens_per_batch": 160}
    return tiny_recipe(project, **asked, **SET)


def mixed_tasks(project: Path, epochs: int) -> Path:
    """Text answers, a label head and a score head, validated, with an early end."""
    write_rows_of_every_head(project / "rows")
    heads = {
        "colour": {"task": {"kind": "classify"}, "head": "label"},
        "mark": {"task": {"kind": "score", "prompt": "How good?", "number": "mark"}, "head": "score"},
        "words": {"task": {"kind": "classify", "prompt": "Say it.", "media": [], "text": "text"}, "loss_weight": 0.5},
    }
    data = [
        {"name": name, "path": str(project / "rows" / f"{name}-{split}.csv"), "split": split, **source}
        for split in ("train", "validation", "test")
        for name, source in heads.items()
    ]
    validated = {"every_n_steps": 2, "limit": 4, "metric": "colour.accuracy", "patience": 2}
    trained = {"train__stages": stages(epochs, heads=True, first={"trains": ["projectors", "heads"]})}
    return tiny_recipe(project, data=data, train__validation=validated, train__tokens_per_batch=192, **trained, **SET)


def distilled(project: Path, epochs: int) -> Path:
    data = tiny_dataset(project / "data", train=20)
    task = {"kind": "classify", "transcript": "label"}
    sources = [{"path": str(data / f"{split}.csv"), "task": task, "split": split} for split in SPLITS]
    first = {"objective": {"kind": "distill", "answers": "given"}}
    return tiny_recipe(
        project, data=sources, train__stages=stages(epochs, first=first), train__tokens_per_batch=64, **SET
    )


PROJECTS: dict[str, Callable[[Path, int], Path]] = {
    one.__name__: one for one in (pictures, sounds, two_media, shared_prefixes, mixed_tasks, distilled)
}


@dataclass(frozen=True)
class Cell:
    """How a project is trained."""

    workers: int = 0
    cache: bool = True
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.workers} workers, {'cached' if self.cache else 'not cached'}, {self.processes} process(es)"

    @property
    def overrides(self) -> list[str]:
        return [f"train.workers={self.workers}", f"train.cache={str(self.cache).lower()}"]


def digest(value: Any) -> str:
    """Of a batch: all of its tensors, bit by bit."""
    found = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found.update(str((one.dtype, tuple(one.shape))).encode() + one.contiguous().view(torch.uint8).numpy().data)
        elif isinstance(one, dict):
            for key in one:
                found.update(str(key).encode())
                add(one[key])
        elif isinstance(one, list | tuple):
            for each in one:
                add(each)
        else:
            found.update(repr(one).encode())

    add(value)
    return found.hexdigest()[:16]


def record(kept: Path, whole: bool) -> None:
    """Keep, in this process, the checkpoint of every step in KEPT/STAGE-STEP, or with `whole` the run, as a kill after
    this step would leave it; and what each micro-batch was made of in KEPT/rows-PROCESS.
    """
    on_save, training_step = WholeCheckpoints.on_save, StageTrainer.training_step

    def keep(self: WholeCheckpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_save(self, args, state, control, **kwargs)
        if PartialState().is_main_process:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            from_, name = (self.folder.parents[1] if whole else checkpoint), f"{self.folder.name}-{state.global_step}"
            shutil.copytree(from_, kept / name)

    def note(self: StageTrainer, model: Any, inputs: Any, items: Any = None) -> Any:
        loss = training_step(self, model, inputs, items)
        line = f"{self.stage.name} {self.row} {self.suspects.row_of(*self.row)} {digest(inputs)}\n"
        with (kept / f"rows-{PartialState().process_index}").open("a") as file:
            file.write(line)
        return loss

    WholeCheckpoints.on_save, StageTrainer.training_step = keep, note


def _train(recipe: Path, run: Path, cell: Cell, kept: Path, whole: bool, rank: int, port: int) -> None:
    try:
        if cell.processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        record(kept, whole)
        torch.manual_seed(rank)  # a resumed process was in no such state before
        finetune.train(finetune.load_recipe(recipe, cell.overrides), run, resume=not whole)
    except BaseException:
        (kept / f"error-{rank}").write_text(traceback.format_exc())
        raise


def trained(recipe: Path, run: Path, cell: Cell, kept: Path, whole: bool = False) -> None:
    """Train, or without `whole` resume, in forks of this process."""
    kept.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = get_context("fork")
    ranks = range(cell.processes)
    processes = [context.Process(target=_train, args=(recipe, run, cell, kept, whole, rank, port)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes), next(kept.glob("error-*")).read_text()


def begun_steps(kept: Path) -> list[str]:
    """'STAGE-STEP' of each step that was kept, in order."""
    found = [path.name for path in kept.iterdir() if path.is_dir()]
    return sorted(found, key=lambda name: (name.partition("-")[0], int(name.partition("-")[2])))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, child in children:
        yield from leaves(child, f"{key}.{name}")
    if not isinstance(value, dict | list | tuple):
        yield key, value


def differs(one: Path, other: Path) -> str | None:
    """The first value in which two checkpoints, or adapter folders, aren't equal to the bit; None if they are."""
    names = {path.name for path in one.iterdir()} | {path.name for path in other.iterdir()}
    for name in sorted(names - {"seconds.json", "sha256.json"}):
        left, right = (dict(leaves(read(folder / name))) for folder in (one, other))
        if left.keys() != right.keys():
            return f"{name}: {sorted(left.keys() ^ right.keys())[:4]}"
        for key, value in left.items():
            if not equal(value, right[key]):
                return f"{name}{key}: {value} and {right[key]}"
    return None


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        with safe_globals():  # of the generators, as transformers reads them
            return torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    return path.read_bytes()


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            key: without_times(value) for key, value in content.items() if key not in TIMES and "seconds" not in key
        }
    return [without_times(value) for value in content] if isinstance(content, list) else content


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other
