"""Reading a recipe: file, overrides, paths, conflicts."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.common.errors import RecipeError
from finetune.recipe.conflicts import conflicts
from finetune.recipe.explain import explain, override, recipe_error
from finetune.recipe.parts import Part
from finetune.recipe.schema import Recipe, outline
from finetune.recipe.words import Location, Problem, describe, shorten
from finetune.recipe.yaml_reader import dump_yaml, near_file, read_text, read_yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, check and resolve a recipe; `overrides` are `full.dotted.key=value`, relative to the recipe's folder too.

    Raises RecipeError, one line a problem: `recipes/x.yaml:9: model.llm.quantize: got 'nf5'; write one of ...`.
    """
    document = read_yaml(read_text(path), str(path))
    if not isinstance(document.value, dict):
        found = "empty" if document.value is None else describe(document.value)
        raise RecipeError(f"{document.place(()).text}: a recipe is a mapping of keys; this is {found}.")
    for assignment in overrides:
        override(document, assignment, outline())
    try:
        recipe: Recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise recipe_error(document, explain(document, error.errors(include_url=False), outline())) from None
    problems: list[Problem] = []
    recipe = _with_paths(recipe, os.path.dirname(os.path.abspath(path)), (), problems)
    problems += conflicts(recipe)
    if problems:
        raise recipe_error(document, problems)
    return recipe


def refuse_missing_trackers(recipe: Recipe) -> None:
    """Raises RecipeError where train.track names a package that isn't installed. Apart from `load_recipe`, which also
    reads the recipes of runs that were trained elsewhere.
    """
    for number, tracker in enumerate(recipe.train.track):
        spec = importlib.util.find_spec(tracker)
        if spec is None or spec.origin is None:  # a mere folder of this name: wandb makes one
            raise RecipeError(f"train.track.{number}: {tracker} isn't installed: pip install {tracker}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every default spelled out; `load_recipe` reads it back equal from any folder."""
    return dump_yaml(recipe.model_dump(mode="json"))


_FOUND: dict[Any, tuple[Callable[[str], bool], str]] = {
    "local": (os.path.exists, "file or folder"),
    "maybe": (os.path.exists, "file or folder"),
    "file": (os.path.isfile, "file"),
    "folder": (os.path.isdir, "folder"),
    "new": (lambda path: True, ""),
}


def _with_paths(value: Any, folder: str, location: Location, problems: list[Problem]) -> Any:
    """`value` with its marked paths made absolute; those that should exist and don't are added to `problems`."""
    if isinstance(value, Part):
        return replace(value, options=_with_paths(value.options, folder, location, problems))
    if isinstance(value, dict):
        return {key: _with_paths(inner, folder, (*location, key), problems) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_paths(inner, folder, (*location, index), problems) for index, inner in enumerate(value)]
    if not isinstance(value, BaseModel):
        return value
    changed = {}
    for key, field in type(value).model_fields.items():
        old, here = getattr(value, key), (*location, key)
        marker = field.json_schema_extra.get("path") if isinstance(field.json_schema_extra, dict) else None
        new = _with_paths(old, folder, here, problems)
        if marker == "maybe" and not getattr(value, "may_be_remote", True):
            marker = "local"
        if marker and old is not None and (marker != "maybe" or _looks_local(str(old), folder)):
            new = type(old)(os.path.abspath(os.path.join(folder, os.path.expanduser(old))))
            found, what = _FOUND[marker]
            if not found(str(new)):
                seen_there = f"not a {what}" if os.path.exists(new) else f"no such {what}"
                problems.append(Problem(here, f"{seen_there}: {shorten(new, 150)}.{near_file(str(new))}"))
        if new != old:
            changed[key] = new
    return value.model_copy(update=changed) if changed else value


def _looks_local(name: str, folder: str) -> bool:
    local = name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or "\\" in name
    return local or os.path.exists(os.path.join(folder, name))
