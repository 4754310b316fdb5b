"""Recipes: read from a file or built in Python, changed, written; their paths and conflicts checked."""

import html
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from finetune.common.errors import RecipeError
from finetune.common.run_folder import of_another_version, write_text
from finetune.recipe.conflicts import conflicts
from finetune.recipe.explain import explain, override, recipe_error, set_key
from finetune.recipe.parts import Part
from finetune.recipe.schema import RecipeSections, Source, outline
from finetune.recipe.words import Location, Problem, describe, shorten
from finetune.recipe.yaml_reader import Document, Place, dump_yaml, near_file, read_text, read_yaml


class Recipe(RecipeSections):
    """A run in one frozen object: `Recipe(name="shelf", model={"llm": {"name": "org/llm"}}, data=[...], train={...})`.

    Its fields are the keys of the YAML file, as sections of `finetune.recipe.schema` or nested dictionaries and lists;
    `finetune schema` documents them. Relative paths are relative to the working directory. Raises RecipeError, one line
    a problem.
    """

    def __init__(self, **sections: Any) -> None:
        checked = _checked(Document(_plain(sections), {(): Place(0, "Recipe")}), os.getcwd())
        super().__init__(**{name: getattr(checked, name) for name in checked.model_fields_set})

    @property
    def file(self) -> Path | None:
        """The YAML file that it was read from; None for one that was built in Python."""
        file: Path | None = self.__dict__.get("_file")
        return file

    @classmethod
    def _of(cls, sections: RecipeSections, file: Path | None = None) -> "Recipe":
        recipe: Recipe = cls.model_construct(sections.model_fields_set, **dict(sections))
        recipe.__dict__["_file"] = file  # not an attribute of pydantic's, which would be compared
        return recipe

    @classmethod
    def read(cls, path: os.PathLike[str] | str, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file. `overrides`: 'full.dotted.key=value', the value as YAML. Relative paths, those of overrides
        too, are relative to the file's folder.

        Raises RecipeError, one line a problem: `recipes/x.yaml:9: model.llm.quantize: got 'nf5'; write one of ...`.
        """
        path = os.fspath(path)
        document = read_yaml(read_text(path), path)
        if not isinstance(document.value, dict):
            found = "empty" if document.value is None else describe(document.value)
            raise RecipeError(f"{document.place(()).text}: a recipe is a mapping of keys; this is {found}.")
        for assignment in overrides:
            override(document, assignment, outline())
        folder = os.path.dirname(os.path.abspath(path))
        try:
            return cls._of(_checked(document, folder), Path(path))
        except RecipeError as error:
            raise RecipeError(f"{error}{of_another_version(Path(folder))}") from None

    @classmethod
    def without_files(cls, content: object) -> "Recipe":
        """A recipe of another machine, or of another day: types and values are checked, paths and conflicts aren't.
        Raises pydantic's ValidationError.
        """
        return cls._of(RecipeSections.model_validate(content))

    def with_(self, *overrides: str, **values: object) -> "Recipe":
        """A changed copy, checked as a whole: `with_("train.stages.0.epochs=3")` takes what `--set` takes, and
        `with_(**{"train.tokens_per_batch": 512})` Python values. Relative paths are relative to the working directory.
        Raises RecipeError.
        """
        content = self.model_dump(mode="json", exclude_unset=True)
        document = Document(content, {(): Place(0, f"Recipe {self.name}")})
        for assignment in overrides:
            override(document, assignment, outline())
        for key, value in values.items():
            set_key(document, key, _plain(value))
        return self._of(_checked(document, os.getcwd()), self.file)

    def save(self, path: Path | str) -> Path:
        """Write the recipe as YAML with every default spelled out and absolute paths; returns the path."""
        write_text(Path(path), dump_recipe(self))
        return Path(path)

    def __str__(self) -> str:
        """YAML of what isn't a default."""
        return dump_yaml(self.model_dump(mode="json", exclude_defaults=True))

    def __repr__(self) -> str:
        return f"# Recipe, without defaults\n{self}".rstrip()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


RecipeLike: TypeAlias = Recipe | os.PathLike[str] | str


def load_recipe(path: os.PathLike[str] | str, overrides: Sequence[str] = ()) -> Recipe:
    """As `Recipe.read`."""
    return Recipe.read(path, overrides)


def as_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """What functions that take a recipe do first: read a file, or take the object; with `overrides` a changed copy.
    Raises RecipeError.
    """
    if isinstance(recipe, Recipe):
        return recipe.with_(*overrides) if overrides else recipe
    if isinstance(recipe, str | os.PathLike):
        return Recipe.read(recipe, overrides)
    raise RecipeError(f"recipe: a {type(recipe).__name__}; give the path of a YAML file, or a finetune.Recipe")


def _plain(value: object) -> object:
    """What YAML would hold in place of sections, parts, paths and tuples."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Part):
        return value.dump()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _checked(document: Document, folder: str) -> RecipeSections:
    """The sections of a document, their paths absolute from `folder`. Raises RecipeError."""
    try:
        sections: RecipeSections = RecipeSections.model_validate(document.value)
    except ValidationError as error:
        raise recipe_error(document, explain(document, error.errors(include_url=False), outline())) from None
    problems: list[Problem] = []
    sections = _with_media(sections)
    sections = _with_paths(sections, folder, (), problems)
    problems += conflicts(sections)
    if problems:
        raise recipe_error(document, problems)
    return sections


def _with_media(recipe: RecipeSections) -> RecipeSections:
    """The recipe with the only encoder's medium in tasks whose `media` aren't written, where they'd be pictures as for
    any task.
    """
    media = {encoder.medium for encoder in recipe.model.encoders.values()}
    if len(media) != 1 or media == {"image"}:
        return recipe
    return recipe.model_copy(update={"data": [_source_with(source, *media) for source in recipe.data]})


def _source_with(source: Source, medium: str) -> Source:
    task = source.task
    if task.media != ("image",) or "media" in task.options.model_fields_set:
        return source
    options = task.options.model_copy(update={"media": (medium,)})
    return source.model_copy(update={"task": replace(task, options=options)})


def refuse_missing_packages(recipe: Recipe) -> None:
    """Raises RecipeError where train.track or train.liger needs a package that isn't installed. Apart from
    `load_recipe`, which also reads the recipes of runs that were trained elsewhere.
    """
    if recipe.train.liger and importlib.util.find_spec("liger_kernel") is None:
        raise RecipeError("train.liger: liger-kernel isn't installed: pip install liger-kernel, or leave it out")
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
    "once": (lambda path: True, ""),
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
        if marker and old is not None and (marker not in ("maybe", "once") or _looks_local(str(old), folder)):
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
