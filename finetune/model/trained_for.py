"""What a model was trained for, from the texts in its folder. Imports no torch."""

import os
from pathlib import Path

from pydantic import ValidationError

from finetune.common.hub import is_repository
from finetune.common.run_folder import RunFolder, RunLike, missing_run, read_json, refuse_file
from finetune.model.bindings import TaskBinding
from finetune.model.composition import BASE_FILE, Composition
from finetune.model.manifest import MANIFEST, AdapterManifest

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
