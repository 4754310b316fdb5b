"""A folder is a registry: `finetune/model/projectors/mlp.py` is the projector `mlp`.

A part is found by the exact name of its file, which imports no torch at module level, since `finetune check` reads its
`Options` without it. The folder's `__init__.py` says what each file must define, as a protocol;
`tests/test_parts_contract.py` checks it for every file.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.common.errors import RecipeError, option


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
    "objectives": "training.objectives",
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
        near = nearest(name, names)
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
            raise RecipeError(f"{option('--option', 'options:')} {pair}: no '='; write KEY=VALUE, of {names}")
        if key not in model.model_fields:
            near = nearest(key, model.model_fields)
            advice = f"did you mean {near!r}?" if near else f"there are: {names}"
            raise RecipeError(f"{option('--option', 'options:')} {pair}: unknown key; {advice}")
        values[key] = None if value == "null" else value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        raise RecipeError(f"{option('--option', 'options:')} {key}={values.get(key)}: {first['msg']}") from None


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word with the most similar spelling, if there is one; case, `-` and `_` don't count."""
    spellings = {other.lower().replace("-", "_"): other for other in words}
    near = difflib.get_close_matches(word[:100].lower().replace("-", "_"), spellings, n=1)
    return spellings[near[0]] if near else None
