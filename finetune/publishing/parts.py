"""What is published, and what it is made of as others can find it: names on the Hub, commits, licences."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finetune.common import hub
from finetune.common.errors import ModelError
from finetune.evaluation.report.content import Content
from finetune.recipe.load import Recipe
from finetune.recipe.schema import LANGUAGE_NOUNS, Source


@dataclass(frozen=True)
class Base:
    """A model that was taken from elsewhere. `key`: "llm", "base" or "encoders.NAME"; `path`: its name in the recipe;
    `name`: its Hub id, None for a local folder; `revision`: its commit there, if known.
    """

    key: str
    path: str
    name: str | None
    revision: str | None
    licence: str | None = None

    @property
    def public_name(self) -> str:
        """The Hub id, or the last part of the path."""
        return self.name or Path(self.path).name

    @property
    def role(self) -> str:
        return LANGUAGE_NOUNS.get(self.key) or f"encoder of {self.key.removeprefix('encoders.')}"


@dataclass(frozen=True)
class Publication:
    """`recipe`, `content`: without paths of this machine; `data_licences`: source -> licence."""

    repo: str
    merged: bool
    recipe: Recipe
    content: Content
    bases: Sequence[Base]
    data_licences: Mapping[str, str | None]

    @property
    def licence(self) -> str | None:
        main = next((base.licence for base in self.bases if base.key == self.recipe.model.language_part), None)
        return self.recipe.publish.license or main


def bases_of(recipe: Recipe, commits: Mapping[str, str | None]) -> list[Base]:
    """The LLM, or base, and the encoders of a resolved recipe. `commits`: by `Base.key`, as they were trained over."""
    paths = {recipe.model.language_part: recipe.model.language_model.name}
    for medium, encoder in recipe.model.encoders.items():
        paths[f"encoders.{medium}"] = str(getattr(encoder.options, "name", encoder.kind))
    hub_names = recipe.publish.hub_names
    return [
        Base(key, path, hub_names[key], None)
        if key in hub_names
        else Base(key, path, None if is_local(path) else path, commits.get(key))
        for key, path in paths.items()
    ]


def is_local(name: str) -> bool:
    """Whether a name of a resolved recipe is a path of this machine: those were made absolute."""
    return os.path.isabs(name) or name.endswith(".gguf")


def with_commits(bases: Sequence[Base]) -> list[Base]:
    """The same; those on the Hub with their commits there. Raises ModelError."""
    from huggingface_hub import HfApi

    resolved = []
    for base in bases:
        if base.name and not re.fullmatch("[0-9a-f]{40}", base.revision or ""):
            with hub.requesting(f"{base.key}: {base.name}"):
                base = replace(base, revision=HfApi().model_info(base.name, revision=base.revision).sha)
        resolved.append(base)
    return resolved


def with_licences(bases: Sequence[Base], licences: Mapping[str, str]) -> list[Base]:
    """The same with licences: from `licences`, else a README.md or NOTICE in the folder, else the card on the Hub."""
    return [replace(base, licence=licences.get(base.key) or _licence_of(base)) for base in bases]


def _licence_of(base: Base) -> str | None:
    if is_local(base.path) and (licence := _licence_in(Path(base.path))):
        return licence
    return _licence_on_hub(base.name, "model") if base.name else None


def _licence_on_hub(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """What the repository's card says; None if it says nothing or can't be read: the recipe must name it then."""
    from huggingface_hub import HfApi

    try:
        with hub.requesting(name):
            info = HfApi().repo_info(name, repo_type=kind)
    except ModelError:
        return None
    return getattr(getattr(info, "card_data", None), "license", None)


def _licence_in(folder: Path) -> str | None:
    """The licence that a folder's README.md or NOTICE names, lower case."""
    for name, pattern in (("README.md", r"^license:\s*(\S+)\s*$"), ("NOTICE", r"^Licen[cs]e:\s*(\S+)\s*$")):
        file = folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if match := re.search(pattern, text, re.MULTILINE):
            return match[1].lower()
    return None


def data_licences(recipe: Recipe) -> dict[str, str | None]:
    """`source_name` -> licence."""
    licences = {}
    for source in recipe.data:
        licence = recipe.publish.licenses.get("data")
        if licence is None and is_local(str(source.path)):
            licence = _licence_in(source.path if source.path.is_dir() else source.path.parent)
        elif licence is None:
            licence = _licence_on_hub(str(source.path), "dataset")
        licences[source_name(source)] = licence
    return licences


def source_name(source: Source) -> str:
    """A dataset's Hub id, or the last part of a path."""
    return source.path.name if is_local(str(source.path)) else str(source.path)
