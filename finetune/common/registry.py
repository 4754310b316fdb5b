"""A folder is a registry: `finetune/model/projectors/mlp.py` is the projector `mlp`.

A part is found by the exact name of its file, which imports no torch at module level, since `finetune check` reads its
`Options` without it. The folder's `__init__.py` says what each file must define, as a protocol;
`tests/test_parts_contract.py` checks it for every file.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from finetune.common.errors import RecipeError


class PartOptions(BaseModel):
    """Base of every part's `Options`: unknown keys are errors, and every field has a description with its unit."""

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
    """The names of all parts of a folder: `part_names("projectors")` is `("conv", "linear", "mlp", ...)`."""
    path = Path(__file__).parents[1].joinpath(*FOLDERS[folder].split("."))
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules([str(path)]) if not m.name.startswith("_") and not m.ispkg)
    )


def kind_of(built: object) -> str:
    """The part that a built object belongs to: the file that defines its class."""
    return type(built).__module__.rpartition(".")[2]


def load_part(folder: str, name: str) -> Any:
    """Import a part by its exact name: a module of the folder's protocol, as in `head: HeadContract = load_part(...)`.

    Raises RecipeError for an unknown name; the message lists the known ones and the file that a new one would be.
    """
    names = part_names(folder)
    if name not in names:
        similar = difflib.get_close_matches(name, names, n=1)
        raise RecipeError(
            f"no {folder.removesuffix('s')} is called {name!r}"
            + (f": did you mean {similar[0]!r}?" if similar else ".")
            + f" There are: {', '.join(names)}. "
            f"A new one is one file: finetune/{FOLDERS[folder].replace('.', '/')}/{name}.py"
        )
    return importlib.import_module(f"finetune.{FOLDERS[folder]}.{name}")
