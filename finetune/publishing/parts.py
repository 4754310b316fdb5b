"""What a model is made of, as others can find it: names on the Hub, commits, licences."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.common import hub
from finetune.common.errors import ModelError


@dataclass(frozen=True)
class Base:
    """A part that was taken from elsewhere. `key`: "llm" or "encoders.NAME"; `here`: its name in the run; `name`: on
    the Hub, None where it is only a folder here; `revision`: the commit there, if known.
    """

    key: str
    here: str
    name: str | None
    revision: str | None
    licence: str | None = None

    @property
    def called(self) -> str:
        """What readers may know it by: nothing of this machine's folders."""
        return self.name or Path(self.here).name


def bases_of(recipe: Mapping[str, Any], saved: Mapping[str, Any], hub_names: Mapping[str, str]) -> list[Base]:
    """The LLM and the encoders of a resolved recipe. `saved`: what multimodal.json says of their commits."""
    model = recipe["model"]
    named = {"llm": (model["llm"]["name"], saved.get("language_model", {}).get("revision"))}
    for medium, part in model["encoders"].items():
        options = saved.get("encoders", {}).get(medium, {}).get("options", {})
        named[f"encoders.{medium}"] = (str(part["name"]), options.get("revision"))
    return [
        Base(key, here, hub_names.get(key), None)
        if key in hub_names
        else Base(key, here, None if is_local(here) else here, revision)
        for key, (here, revision) in named.items()
    ]


def is_local(name: str) -> bool:
    """Whether a name of a resolved recipe is of this machine: those were made absolute."""
    return os.path.isabs(name) or name.endswith(".gguf")


def with_commits(bases: list[Base]) -> list[Base]:
    """The same, each that is on the Hub with its commit there. Raises ModelError."""
    from huggingface_hub import HfApi

    found = []
    for base in bases:
        if base.name and not re.fullmatch("[0-9a-f]{40}", base.revision or ""):
            with hub.asking(f"{base.key}: {base.name}"):
                base = replace(base, revision=HfApi().model_info(base.name, revision=base.revision).sha)
        found.append(base)
    return found


def with_licences(bases: list[Base], named: Mapping[str, str]) -> list[Base]:
    """The same with licences: as named, else as the card of the Hub, or a README.md or NOTICE in the folder, has it."""
    return [replace(base, licence=named.get(base.key) or _licence_of(base)) for base in bases]


def _licence_of(base: Base) -> str | None:
    from huggingface_hub import HfApi

    if is_local(base.here) and (found := _licence_in(Path(base.here))):
        return found
    if base.name is None:
        return None
    try:
        with hub.asking(base.name):
            card = HfApi().model_info(base.name).card_data
    except ModelError:  # unknown, then, and asked for
        return None
    return getattr(card, "license", None)


def _licence_in(folder: Path) -> str | None:
    """What a model's or a data set's folder says of its licence, lower case."""
    for name, pattern in (("README.md", r"^license:\s*(\S+)\s*$"), ("NOTICE", r"^Licen[cs]e:\s*(\S+)\s*$")):
        file = folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1].lower()
    return None


def data_licences(recipe: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str | None]:
    """{source as readers may know it: its licence}."""
    found = {}
    for source in recipe["data"]:
        path = str(source["path"])
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        found[source_name(source)] = named.get("data") or (_licence_in(folder) if is_local(path) else _dataset(path))
    return found


def source_name(source: Mapping[str, Any]) -> str:
    """A dataset's Hub id, or the last part of a path."""
    return Path(source["path"]).name if is_local(str(source["path"])) else str(source["path"])


def _dataset(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        with hub.asking(name):
            card = HfApi().dataset_info(name).card_data
    except ModelError:
        return None
    return getattr(card, "license", None)
