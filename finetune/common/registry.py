"""A folder is a registry: `finetune/model/projectors/mlp.py` is the projector `mlp`.

A part's file imports no torch at module level (`finetune check` reads its `Options` without it) and is found by its
exact name. What each folder's files must define is written in that folder's `__init__.py` and checked by
`tests/test_parts_contract.py` over every file there is.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel, ConfigDict

from finetune.common.errors import RecipeError


class PartOptions(BaseModel):
    """Base of every part's `Options`: strict, unknown keys are errors, every field documented with its unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)


FOLDERS = {
    "encoders": "model.encoders",
    "projectors": "model.projectors",
    "fusion": "model.fusion",
    "heads": "model.heads",
    "tasks": "data.tasks",
    "formats": "data.formats",
    "export": "export",
}


@cache
def part_names(folder: str) -> tuple[str, ...]:
    """The parts there are: `part_names("projectors")` is `("linear", "mlp", ...)`."""
    path = Path(__file__).parents[1].joinpath(*FOLDERS[folder].split("."))
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules([str(path)]) if not m.name.startswith("_") and not m.ispkg)
    )


def kind_of(built: object) -> str:
    """The part that a built object belongs to: the file that defines its class."""
    return type(built).__module__.rpartition(".")[2]


def load_part(folder: str, name: str) -> ModuleType:
    """Import one part by its exact name.

    Raises RecipeError for an unknown name, with the names there are and where to write a new one.
    """
    names = part_names(folder)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise RecipeError(
            f"no {folder.removesuffix('s')} is called {name!r}"
            + (f": did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(names)}. "
            f"A new one is one file: finetune/{FOLDERS[folder].replace('.', '/')}/{name}.py"
        )
    return importlib.import_module(f"finetune.{FOLDERS[folder]}.{name}")
