"""A folder is a registry: `finetune/model/projectors/mlp.py` is the projector `mlp`.

A part's file imports no torch at module level (`finetune check` reads its `Options` without it) and is found by its
exact name. What each folder's files must define is written in that folder's `__init__.py` and checked by
`tests/test_parts_contract.py` over every file there is.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

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


def part_from(folder: str, saved: dict[str, Any]) -> tuple[str, Any]:
    """(kind, Options) from what a config keeps: {"kind": ..., "options": {...}}."""
    return saved["kind"], load_part(folder, saved["kind"]).Options(**saved["options"])


def load_part(folder: str, name: str) -> ModuleType:
    """Import one part by its exact name.

    Raises RecipeError for an unknown name, with the names there are and where to write a new one.
    """
    names = part_names(folder)
    if name not in names:
        near = _nearest(name, names)
        raise RecipeError(
            f"no {folder.removesuffix('s')} is called {name!r}"
            + (f": did you mean {near!r}?" if near else ".")
            + f" There are: {', '.join(names)}. "
            f"A new one is one file: finetune/{FOLDERS[folder].replace('.', '/')}/{name}.py"
        )
    return importlib.import_module(f"finetune.{FOLDERS[folder]}.{name}")


OptionsT = TypeVar("OptionsT", bound=BaseModel)


def parse_options(pairs: Sequence[str], model: type[OptionsT]) -> OptionsT:
    """The values of repeated `--option KEY=VALUE`, validated by `model`; the word null is None. Raises RecipeError."""
    values: dict[str, str | None] = {}
    names = ", ".join(model.model_fields)
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise RecipeError(f"--option {pair}: no '='; write KEY=VALUE, of {names}")
        if key not in model.model_fields:
            near = _nearest(key, model.model_fields)
            advice = f"did you mean {near!r}?" if near else f"there are: {names}"
            raise RecipeError(f"--option {pair}: unknown key; {advice}")
        values[key] = None if value == "null" else value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        raise RecipeError(f"--option {key}={values.get(key)}: {first['msg']}") from None


def _nearest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)
