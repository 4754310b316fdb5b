"""The folder as it will be on the Hub: the model's files and the recipe, without paths of this machine."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.common.certificate import NAME as CERTIFICATE
from finetune.common.certificate import Certificate
from finetune.common.run_folder import JsonObject, file_hash, read_json, write_json
from finetune.model.manifest import MANIFEST
from finetune.publishing.parts import Base
from finetune.recipe.load import Recipe

VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # any words: copied as they are


def stage_adapter(source: Path, into: Path, bases: Sequence[Base]) -> None:
    """Copy an adapter's folder; its LLM and encoders are named as on the Hub, each with its commit."""
    copy_cleaned(source, into, bases)
    by_key = {base.key: base for base in bases}
    content = read_json(into / MANIFEST)
    llm = by_key["llm" if content["model"]["llm"] else "base"]
    content["model"][llm.key] |= {"name": llm.public_name, "revision": llm.revision}
    for medium, encoder in content["model"]["encoders"].items():
        base = by_key[f"encoders.{medium}"]
        encoder |= {"name": base.public_name, "revision": base.revision}
    write_json(into / MANIFEST, content)
    if (into / "adapter_config.json").is_file():
        lora = read_json(into / "adapter_config.json")
        lora |= {"base_model_name_or_path": llm.public_name, "revision": llm.revision}
        write_json(into / "adapter_config.json", lora)


def stage_merged(source: Path, into: Path, bases: Sequence[Base], certificate: Certificate) -> Certificate:
    """Copy a merged folder, with its certificate, which is returned. If a config named a folder of this machine, the
    certificate has the hash of the config without it; hashes of weights are never written again.
    """
    changed = copy_cleaned(source, into, bases)
    hashes = {**certificate.sha256, **{name: file_hash(into / name) for name in changed}}
    published = certificate.model_copy(update={"sha256": hashes})
    published.write(into / CERTIFICATE)
    return published


def copy_cleaned(source: Path, into: Path, bases: Sequence[Base]) -> list[str]:
    """Copy files; weights are hard-linked if the disk can. Returns the names of those that had to be changed."""
    changed = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if not path.is_file() or name in ("README.md", CERTIFICATE):
            continue
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json" and path.name not in VOCABULARY:
            before = read_json(path)
            if (after := cleaned(before, public_names(bases))) != before:
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


def public_names(bases: Sequence[Base]) -> dict[str, str]:
    return {base.path: base.public_name for base in bases}


def cleaned(value: object, names: Mapping[str, str]) -> object:
    """JSON with `names` replaced, and other existing paths of this machine cut to their last part."""
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


def published_recipe(recipe: Recipe, bases: Sequence[Base], repo: str) -> Recipe:
    """A resolved recipe without paths of this machine."""
    content: JsonObject = recipe.model_dump(mode="json")
    content["train"]["cache_folder"] = None
    content["publish"]["repo"] = repo
    return Recipe.without_files(cleaned(content, public_names(bases)))
