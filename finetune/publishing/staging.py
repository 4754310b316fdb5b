"""The folder as it will be on the Hub: the model's files without names of this machine, the recipe, the manifest."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.common.certificate import NAME as CERTIFICATE
from finetune.common.certificate import file_hash
from finetune.common.hub import MANIFEST
from finetune.common.run_folder import read_json, write_json, write_text
from finetune.publishing.parts import Base
from finetune.recipe.yaml_reader import dump_yaml

VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # words of all kinds: only copied


def stage_adapter(source: Path, into: Path, bases: Sequence[Base]) -> None:
    """Copy an adapter's folder; its LLM and encoders are named as the Hub has them."""
    copy_cleaned(source, into, bases)
    content = named(read_json(into / "multimodal.json"), bases)
    write_json(into / "multimodal.json", content)
    if (into / "adapter_config.json").is_file():
        llm = content["language_model"]
        lora = read_json(into / "adapter_config.json")
        write_json(
            into / "adapter_config.json",
            {**lora, "base_model_name_or_path": llm["name"], "revision": llm["revision"]},
        )


def named(content: Mapping[str, Any], bases: Sequence[Base]) -> dict[str, Any]:
    """multimodal.json with the LLM and the encoders as the Hub has them, each with its commit."""
    by_key = {base.key: base for base in bases}
    found: dict[str, Any] = cleaned(content, names_of(bases))
    found["language_model"] |= {"name": by_key["llm"].called, "revision": by_key["llm"].revision}
    for medium, part in found["encoders"].items():
        base = by_key[f"encoders.{medium}"]
        part["options"] |= {"name": base.called, "revision": base.revision}
    return found


def stage_merged(source: Path, into: Path, bases: Sequence[Base], certificate: Mapping[str, Any]) -> None:
    """Copy a merged folder, with its certificate. Where a config named a folder of this machine, the certificate's hash
    is that of the config without it; hashes of weights are never written anew.
    """
    changed = copy_cleaned(source, into, bases)
    hashes = {**certificate["sha256"], **{name: file_hash(into / name) for name in changed}}
    content = cleaned({**certificate, "sha256": hashes}, names_of(bases))
    write_json(into / CERTIFICATE, content)


def copy_cleaned(source: Path, into: Path, bases: Sequence[Base]) -> list[str]:
    """Copy files; weights are linked where the disk can. Returns those that had to be changed."""
    changed = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if not path.is_file() or name in ("README.md", CERTIFICATE, MANIFEST):
            continue
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json" and path.name not in VOCABULARY:
            before = read_json(path)
            if (after := cleaned(before, names_of(bases))) != before:
                write_json(into / name, after)
                changed.append(name)
                continue
        link(path, into / name)
    return changed


def link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, to)


def names_of(bases: Sequence[Base]) -> dict[str, str]:
    return {base.here: base.called for base in bases}


def cleaned(value: Any, names: Mapping[str, str]) -> Any:
    """JSON with parts named as readers know them, and of other paths of this machine only the last part."""
    if isinstance(value, dict):
        return {key: cleaned(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [cleaned(inner, names) for inner in value]
    if isinstance(value, str):
        if value in names:
            return names[value]
        if os.path.isabs(value) and os.path.exists(value):
            return Path(value).name
    return value


def published_recipe(recipe: Mapping[str, Any], bases: Sequence[Base], repo: str) -> dict[str, Any]:
    """A resolved recipe as JSON, without paths of this machine."""
    content = json.loads(json.dumps(recipe, default=str))
    content["train"]["cache_folder"] = None
    content["publish"]["repo"] = repo
    return cleaned(content, names_of(bases))


def write_recipe(into: Path, recipe: Mapping[str, Any]) -> None:
    write_text(into / "recipe.yaml", dump_yaml(recipe))


def write_manifest(into: Path, *, recipe: str, kind: str) -> None:
    """`kind`: 'adapter' or 'merged'. To be written last: it lists all other files."""
    files = {
        path.relative_to(into).as_posix(): {"sha256": file_hash(path), "bytes": path.stat().st_size}
        for path in sorted(into.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(into / MANIFEST, {"format": 1, "recipe": recipe, "kind": kind, "files": files})
