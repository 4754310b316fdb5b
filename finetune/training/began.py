"""What a run began with: versions of packages, the number of processes, and the files of its models."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.common.errors import OVERWRITE, RUN, TrainingError, option
from finetune.common.progress import console
from finetune.common.run_folder import RunFolder, read_json, write_json
from finetune.common.version import DISTRIBUTION, versions
from finetune.recipe.load import Recipe

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
FILE = "models.json"  # in the run's data/
PATTERNS = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model")
BLOCK, BLOCKS = 2**20, 64  # of a file that are read


def record_versions(path: Path, processes: int) -> None:
    """Keep what a run began with; print which versions have changed where it is resumed.

    Raises TrainingError for another number of processes: each would go on in the middle of another's rows.
    """
    current = {**versions(PACKAGES), "processes": processes}
    before = read_json(path) if path.is_file() else current
    if before["processes"] != processes:
        raise TrainingError(
            f"{path.parent}: this run began with {before['processes']} processes and can't go on with {processes}"
        )
    for name in (DISTRIBUTION, *PACKAGES):
        begun, now = (kept.get(name, "of an unknown version") for kept in (before, current))
        if begun != now:
            console.print(f"this run began with {name} {begun}, and goes on with {now}")
    write_json(path, before)


def refuse_other_models(folder: RunFolder, found: Mapping[str, str]) -> None:
    """Keep what identifies the models of a run, `found`: {what: hash or commit}. Raises TrainingError where a run that
    is resumed began with others.
    """
    path = folder.data / FILE
    before = read_json(path) if path.is_file() else {}
    if changed := [what for what, value in found.items() if before.get(what, value) != value]:
        more = f" ({len(changed) - 1} more like it)" if len(changed) > 1 else ""
        raise TrainingError(
            f"{changed[0]}: not what this run began with{more}: what {folder.path} has learnt belongs to the model "
            f"from then. Put that back, or begin anew with {option(*OVERWRITE)} or another {option(*RUN)}"
        )
    write_json(path, {**before, **found})


def model_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(path, hash) of the files of a recipe's LLM and encoders that are on this machine and not from the Hub."""
    encoders = [getattr(part.options, "name", None) for part in recipe.model.encoders.values()]
    for place in (Path(name) for name in (recipe.model.language_model.name, *encoders) if name):
        for file in [place] if place.is_file() else sorted(one for each in PATTERNS for one in place.glob(each)):
            yield str(file), sampled_hash(file)


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file's size and of `BLOCKS` parts of it, evenly apart: all of it where it isn't larger."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(max(number * BLOCK, (size - BLOCK) * number // (BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
