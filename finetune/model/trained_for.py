"""What a model was trained for, from the texts in its folder. Imports no torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.common.certificate import NAME as CERTIFICATE
from finetune.common.certificate import file_hashes, read_certificate
from finetune.common.errors import RecipeError
from finetune.common.hub import is_repository
from finetune.common.run_folder import RunFolder, RunLike, missing_run, read_json, refuse_file
from finetune.model.bindings import TaskBinding
from finetune.model.composition import BASE_FILE, Composition
from finetune.model.manifest import MANIFEST, AdapterManifest
from finetune.recipe.schema import RecipeSections

CONFIG = "config.json"  # of a merged model


def refuse_missing(source: RunLike) -> None:
    """Raises ArtifactError where `source` is neither a folder nor could be the name of a model of the Hub: "user/name"
    is one unless there is a folder called user; and for a run that isn't trained yet.
    """
    name = os.fspath(source)
    if not Path(name).exists() and not (is_repository(name) and not Path(name).parent.is_dir()):
        raise missing_run(Path(name))
    refuse_file(Path(name))
    run, folder = RunFolder(name), folder_of_model(Path(name))
    if run.recipe.is_file() and folder == run.path and not any((folder / one).is_file() for one in (MANIFEST, CONFIG)):
        RunFolder.open(source, needs="adapter")


def folder_of_model(path: Path) -> Path:
    """The folder of a model: of a run its merged model if there is one."""
    run = RunFolder(path)
    found = (p for p in (run.merged, run.adapter) if (p / MANIFEST).is_file() or (p / CONFIG).is_file())
    return next(found, path)


def bindings_at(source: RunLike) -> dict[str, TaskBinding] | None:
    """{name: task binding} of a model in a folder; None where only loading it tells. Raises ArtifactError."""
    parts = parts_at(source)
    return parts.bindings if parts else None


def fingerprint(folder: Path) -> str:
    """Of a model's files, hexadecimal: from its certificate where it has one."""
    certified = (folder / CERTIFICATE).is_file()
    hashes = read_certificate(folder).sha256 if certified else file_hashes(folder)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def is_own(folder: Path) -> bool:
    """Whether a folder holds a model that was trained here, not one that transformers loads as it is."""
    if any((folder / one).is_file() for one in (MANIFEST, BASE_FILE)) or not (folder / CONFIG).is_file():
        return True
    return "parts" in read_json(folder / CONFIG)


def refuse_unfit_teachers(recipe: RecipeSections) -> None:
    """Raises ArtifactError for a teacher that isn't there, RecipeError for one that doesn't read a stage's media."""
    for number, stage in enumerate(recipe.train.stages):
        if stage.objective.needs != "teacher":
            continue
        options: Any = stage.objective.options
        refuse_missing(options.teacher)
        if (parts := parts_at(options.teacher)) is None:
            continue  # known once it is loaded
        for index, source in enumerate(recipe.data):
            used = source.split == "train" and index in (stage.sources or [index])
            if used and (unread := [kind for kind in source.task.media if kind not in parts.placeholders]):
                reads = ", ".join(parts.placeholders) or "text only"
                raise RecipeError(
                    f"train.stages.{number}.objective.teacher: {options.teacher} reads {reads}, but rows of "
                    f"data.{index} hold {', '.join(unread)}: take another teacher, or write the stage's sources"
                )


def parts_at(source: RunLike) -> AdapterManifest | Composition | None:
    """What a model in a folder is made of; None where only loading it tells. Raises ArtifactError."""
    folder = folder_of_model(Path(source))
    if (folder / MANIFEST).is_file():
        return AdapterManifest.read(folder)
    if not (folder / CONFIG).is_file():
        return None
    try:
        if (folder / BASE_FILE).is_file():
            return Composition.model_validate(read_json(folder / BASE_FILE))
        return Composition.model_validate(read_json(folder / CONFIG).get("parts"))
    except ValidationError:  # loading says what is wrong with it
        return None
