"""A plan in a process of its own: within a time limit, or beside a run. Imports no torch.

What can't be planned may train all the same: then there is no plan, and nothing else happens.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.common.run_folder import RunFolder
from finetune.recipe.load import Recipe, load_recipe
from finetune.training.automatic import AutoNumbers
from finetune.training.steps import has_auto

LINE_SECONDS = 60.0
WAIT_SECONDS = 300.0
# What torchrun tells its processes; a plan isn't one of them.
OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_auto(recipe: Recipe, gpu: bool, processes: int = 1) -> Recipe:
    """The recipe with numbers in the place of `auto` in its section `train`; prints why they are what they are. A plan
    for this machine's GPU tells how many tokens a packed row may have, and how many activation checkpoints there are;
    none without a GPU or a plan. Raises DataError, ModelError.
    """
    from finetune.common.progress import console

    train = recipe.train
    figures = None
    if gpu and "auto" in (train.checkpoint_every_n_layers, train.tokens_per_batch):
        with TemporaryDirectory() as folder, planning(recipe.save(Path(folder, "recipe.yaml"))) as finish:
            figures = finish(WAIT_SECONDS)
        if figures is None:
            console.print(
                f"no plan of this GPU's memory within {WAIT_SECONDS:.0f} seconds: auto goes on without its limit; "
                "`finetune plan` says why; if memory runs out, write tokens_per_batch"
            )
    if has_auto(train):
        choice = AutoNumbers(recipe, processes)
        chosen = choice.choose()
        if figures and figures["tokens_per_batch"] < int(chosen.train.tokens_per_batch):
            chosen = choice.choose(figures["tokens_per_batch"])
        for reason in chosen.reasons:
            console.print(reason)
        train = chosen.train
    if train.checkpoint_every_n_layers == "auto":
        train = train.model_copy(update={"checkpoint_every_n_layers": figures["checkpoints"] if figures else 0})
        unplanned = "train.checkpoint_every_n_layers: 0, without a plan of a GPU"
        console.print(figures["checkpoints_reason"] if figures else unplanned)
    return recipe.model_copy(update={"train": train})


def as_begun(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the dtype and the numbers that a run began with in the place of `auto`. Raises RecipeError."""
    train, llm = recipe.train, recipe.model.language_model
    keys = [key for key in ("tokens_per_batch", "checkpoint_every_n_layers", "cache") if getattr(train, key) == "auto"]
    if not (keys or has_auto(train) or llm.dtype == "auto") or not folder.recipe.is_file():
        return recipe
    before = load_recipe(folder.recipe)
    if llm.dtype == "auto":
        recipe = recipe.with_dtype(before.model.language_model.dtype)
    begun = before.train
    if len(begun.stages) != len(train.stages):
        return recipe
    stages = [
        stage.model_copy(update={"epochs": old.epochs}) if stage.epochs == "auto" else stage
        for stage, old in zip(train.stages, begun.stages, strict=True)
    ]
    numbers = {key: getattr(begun, key) for key in keys}
    return recipe.model_copy(update={"train": train.model_copy(update={**numbers, "stages": stages})})


@contextmanager
def planning(recipe: Path | str, overrides: Sequence[str] = ()) -> Iterator[Callable[[float], Any]]:
    """Begin a plan. What it gives waits for so many seconds and returns what `finetune.training.plan.__main__` prints;
    None if there is no plan by then, or none at all.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.training.plan", str(recipe), *overrides],
        env={k: v for k, v in os.environ.items() if k not in OF_SEVERAL},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def finish(seconds: float) -> Any:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        return json.loads(printed.splitlines()[-1]) if process.returncode == 0 else None

    try:
        yield finish
    finally:
        process.kill()
        process.communicate()
