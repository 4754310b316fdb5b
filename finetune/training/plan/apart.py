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

from finetune.recipe.load import Recipe, dump_recipe

LINE_SECONDS = 10.0
WAIT_SECONDS = 300.0
# What torchrun tells its processes; a plan isn't one of them.
OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def plan_line(recipe: Path | str, overrides: Sequence[str] = (), seconds: float = LINE_SECONDS) -> str | None:
    """A plan as one line; None if that takes longer, or if configs would have to be downloaded."""
    with planning(recipe, overrides, {"HF_HUB_OFFLINE": "1"}) as finish:
        figures = finish(seconds)
    return figures["line"] if figures else None


def without_auto(recipe: Recipe, gpu: bool) -> Recipe:
    """The recipe with a number in the place of `train.checkpoint_every_n_layers: auto`: 1 where this machine's GPU is
    too small without activation checkpoints, 0 otherwise, and where there is no plan.
    """
    if recipe.train.checkpoint_every_n_layers != "auto":
        return recipe
    figures = None
    if gpu:
        with TemporaryDirectory() as folder:
            file = Path(folder, "recipe.yaml")
            file.write_text(dump_recipe(recipe))
            with planning(file) as finish:
                figures = finish(WAIT_SECONDS)
    train = recipe.train.model_copy(update={"checkpoint_every_n_layers": figures["checkpoints"] if figures else 0})
    return recipe.model_copy(update={"train": train})


@contextmanager
def planning(
    recipe: Path | str, overrides: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Iterator[Callable[[float], Any]]:
    """Begin a plan. What it gives waits for so many seconds and returns what `finetune.training.plan.__main__` prints;
    None if there is no plan by then, or none at all.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.training.plan", str(recipe), *overrides],
        env={k: v for k, v in os.environ.items() if k not in OF_SEVERAL} | (environment or {}),
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
