"""The run folder: names, and every read and write. Files appear whole or not at all.

runs/NAME/
  recipe.yaml        as resolved, with package versions below it in versions.json
  data/              counts per split, tokenized rows; suspects.jsonl, rows of a loss that wasn't finite;
                     changes.jsonl, what the recipe was given anew on a resume; micro_batches.jsonl, from which step
                     on rows are computed in pieces; warnings.jsonl, what seemed wrong with a stage; vllm-STAGE/,
                     the log of a server that sampled its answers
  checkpoints/STAGE/checkpoint-N/    appears under this name only when it is whole; the last two are kept; STAGE/final
                     when the stage is done; the hashes of its files are in each
  tensorboard/STAGE/ event files, if train.track names tensorboard
  adapter/           the publishable artefact
  metrics.json, predictions.jsonl, plots/
  evaluations/NAME/  metrics.json and predictions.jsonl of rows that the recipe doesn't name
  merged/            a self-contained checkpoint; certificate.json beside it
"""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from pydantic import ValidationError

from finetune.common import display
from finetune.common.errors import OVERWRITE, RESUME, RUN, ArtifactError, RecipeError, TrainingError, option
from finetune.common.registry import nearest
from finetune.common.version import DISTRIBUTION, VERSION

JsonObject = dict[str, Any]
WRITTEN_FIRST = {"recipe.yaml", "versions.json"}  # before rows and weights are read
WRITTEN_LATER = {
    *("data", "checkpoints", "adapter", "merged", "exports", "published", "plots", "tensorboard", "evaluations"),
    *("metrics.json", "predictions.jsonl", "certificate.json", "report.html"),
}
RunPart = Literal["recipe", "adapter", "metrics", "merged"]
HASHES = "sha256.json"  # in each checkpoint
SHOWN_RUNS = 8  # in an error
SHOWN_KEYS = 4
# What a resumed run may be given anew: neither the rows of its steps nor its weights hang on it.
MAY_CHANGE = re.compile(
    r"train\.(skip_bad_rows|checkpoint_every_n_layers|dequantize_once|workers|stages\.\d+\.(max_grad_norm|learning_rates?(\..+)?))"
)
UNFINISHED = (".partial", ".old")  # endings of what is being written, or was being replaced


def refuse_several_processes(command: str) -> None:
    """Raises TrainingError under accelerate launch or torchrun: only training works with several processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise TrainingError(f"{command} is for one process, not {count}: launch `finetune train`, then {command} alone")


class RunFolder:
    """What a run has written, by its paths; functions take it in place of the folder's path."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self.path = path = Path(path)
        self.recipe = path / "recipe.yaml"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.json"
        self.predictions = path / "predictions.jsonl"
        self.plots = path / "plots"
        self.evaluations = path / "evaluations"
        self.merged = path / "merged"
        self.certificate = path / "certificate.json"

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        done = [name for name, path in self._results().items() if path.exists()]
        return f"RunFolder({str(self.path)!r}): {', '.join(done) or 'nothing yet'}"

    def _repr_html_(self) -> str:
        shown = [display.heading(f"Run {self.path.name}"), *map(display.picture, sorted(self.plots.glob("*.png")))]
        return "".join([*shown, display.files(self._results())])

    def _results(self) -> dict[str, Path]:
        names = ("recipe", "adapter", "metrics", "predictions", "merged", "certificate")
        return {**{name: getattr(self, name) for name in names}, "report": self.path / "report.html"}

    @classmethod
    def create(cls, path: Path, recipe_text: str, resume: bool, overwrite: bool = False) -> "RunFolder":
        """A new folder, or with `resume` an existing one of the same recipe. With `overwrite` a run that is there is
        removed; where the folder holds anything but a run, it is left as it is. Raises TrainingError, RecipeError.

        A training that was refused before its first step, for a bad row say, leaves a folder that counts as new.
        """
        run = cls(path)
        run.refuse_taken(resume, overwrite)
        if overwrite and path.exists():
            run._remove()
        if resume and (began := run.recipe.read_text(encoding="utf-8")) != recipe_text:
            run._change(began, recipe_text)
        if not resume:
            shutil.rmtree(run.data, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, recipe_text)
        return run

    def _change(self, began: str, recipe_text: str) -> None:
        """Note what a resumed run goes on with in the place of what it began with. Raises TrainingError for what can't
        change on the way.
        """
        from finetune.common.progress import console

        changes = _changes(began, recipe_text)
        if fixed := [change for change in changes if not MAY_CHANGE.fullmatch(change.key)]:
            more = f"; {len(fixed) - SHOWN_KEYS} more" if len(fixed) > SHOWN_KEYS else ""
            raise TrainingError(
                f"{self.path}: the recipe isn't the one that this run began with "
                f"({'; '.join(map(str, fixed[:SHOWN_KEYS]))}{more}); resume with the same recipe and "
                f"{option('--set', 'overrides=')}, or choose another {option(*RUN)}{of_another_version(self.path)}"
            )
        for change in changes:
            console.print(f"from here on: {change.key} is {change.now}, was {change.before}")
        path = self.data / "changes.jsonl"
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, before + "".join(json.dumps(asdict(change)) + "\n" for change in changes))

    def _refused_before_a_step(self) -> bool:
        """Whether the folder is empty, or holds only what is written before the first step."""
        names = {entry.name for entry in self.path.iterdir()}
        return names <= WRITTEN_FIRST or names == WRITTEN_FIRST | {"data"}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out of the folder. Raises TrainingError where one is in it."""
        from filelock import FileLock, Timeout

        from finetune.common.progress import console

        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.absolute()  # "." has no name
        lock = FileLock(whole.with_name(f".{whole.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"{self.path}: another process is training it: wait, stop that one, or choose another {option(*RUN)}"
            ) from None
        except (OSError, NotImplementedError) as error:  # a network drive without locks
            console.print(f"{self.path}: no lock here ({error}): make sure that no other process trains this run")
        try:
            yield
        finally:
            lock.release()

    def refuse_taken(self, resume: bool, overwrite: bool) -> None:
        """Raises TrainingError where a run is here already, or with `resume` none, and RecipeError for both options."""
        if resume and overwrite:
            raise RecipeError(
                f"{option(*RESUME)} goes on with a run and {option(*OVERWRITE)} removes it: leave out one of them"
            )
        if not overwrite and self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path}: a file, where a run is a folder; choose another {option(*RUN)}")
        if resume and not self.recipe.is_file():
            raise TrainingError(
                f"{self.path}: nothing to resume: there is no run here; leave out {option(*RESUME)} to begin one"
            )
        if not (resume or overwrite) and self.path.exists() and not self._refused_before_a_step():
            raise TrainingError(
                f"{self.path}: there is a run here already: {option(*RESUME)} goes on with it, "
                f"{option(*OVERWRITE)} removes it and begins anew, {option(*RUN)} makes another"
            )

    def _remove(self) -> None:
        """Remove all that a run has written, and nothing else. Raises TrainingError where there is anything else."""
        entries = list(self.path.iterdir()) if self.path.is_dir() else [self.path]
        known = WRITTEN_FIRST | WRITTEN_LATER
        names = {entry.name for entry in entries}
        foreign = [one.name for one in entries if (one.stem if one.suffix in UNFINISHED else one.name) not in known]
        if not names >= WRITTEN_FIRST and not names <= WRITTEN_FIRST:
            foreign = foreign or [*names]
        if foreign:
            raise TrainingError(
                f"{self.path}: {option(*OVERWRITE)} removes only what a run has written; {sorted(foreign)[0]} "
                f"is something else: move it away, or choose another {option(*RUN)}"
            )
        for entry in sorted(entries, key=lambda entry: entry.name in WRITTEN_FIRST):  # these tell that it is a run
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @classmethod
    def open(cls, path: "RunLike", needs: RunPart = "recipe") -> "RunFolder":
        """An existing run that holds `needs`. Raises ArtifactError."""
        if not isinstance(path, str | os.PathLike):
            raise ArtifactError(f"run: a {type(path).__name__}; give a run folder's path, or a finetune.RunFolder")
        run = cls(os.fspath(path))
        if not run.path.exists():
            raise missing_run(run.path)
        refuse_file(run.path)
        made_by = {"recipe": "train", "metrics": "evaluate", "merged": "merge"}
        if needs == "adapter" and run.recipe.is_file() and not run.adapter.exists():
            raise ArtifactError(
                f"{path}: no adapter here: its training hasn't finished; {run.resume_command()} goes on with it"
            )
        for part in ("recipe", needs):
            if not getattr(run, part).exists():
                raise ArtifactError(
                    f"{path}: no {getattr(run, part).name} here: not a run folder, or `finetune {made_by[part]}` "
                    "hasn't finished"
                )
        return run

    def resume_command(self) -> str:
        """What resumes its training."""
        command = f"finetune train {shlex.quote(str(self.recipe))} --run {shlex.quote(str(self.path))} {RESUME[0]}"
        return option(f"`{command}`", f"finetune.train({str(self.recipe)!r}, {str(self.path)!r}, {RESUME[1]})")

    def evaluation_of(self, rows: Path) -> Path:
        """The folder of the scores on rows that the recipe doesn't name."""
        return self.evaluations / rows.absolute().stem

    def read_metrics(self) -> JsonObject:
        return read_json(self.metrics) if self.metrics.is_file() else {}

    def update_metrics(self, **sections: Mapping[str, object]) -> None:
        """Merge sections into metrics.json, one level deep."""
        content = self.read_metrics()
        for name, section in sections.items():
            content[name] = {**content.get(name, {}), **section}
        write_json(self.metrics, content)

    def remove_torn(self, stage: str) -> None:
        """Remove a stage's half-written checkpoints."""
        for path in (self.checkpoints / stage).glob("*.partial"):
            shutil.rmtree(path)

    def checkpoints_of(self, stage: str) -> list[Path]:
        """The checkpoints of a stage, newest first: only `final` if it is done."""
        folder = self.checkpoints / stage
        if (folder / "final").is_dir():
            return [folder / "final"]
        numbered = [path for path in folder.glob("checkpoint-*") if path.suffix not in UNFINISHED]
        return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


@dataclass(frozen=True)
class Change:
    """Of a recipe's value, as text."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} there, {self.now} here"


def _changes(there: str, here: str) -> list[Change]:
    """The values in which two recipes differ."""
    import yaml  # which an environment that only serves has no need of

    before, now = (dict(_leaves(yaml.load(text, yaml.BaseLoader))) for text in (there, here))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [Change(key, before.get(key, "nothing"), now.get(key, "nothing")) for key in keys]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of each value that holds no others."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not children:
        yield key, str(value)
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


RunLike: TypeAlias = RunFolder | os.PathLike[str] | str


def refuse_file(path: Path) -> None:
    """Raises ArtifactError for a file, such as a recipe, where a folder is needed."""
    if path.is_file():
        made = f"; `finetune run {path}` makes one" if path.suffix in (".yaml", ".yml") else ""
        raise ArtifactError(f"{path}: a file, where the folder of a run is needed{made}")


def missing_run(path: Path) -> ArtifactError:
    """What to raise where a run's folder isn't there: it names those that are, beside it and in runs/."""
    found = sorted({file.parent for place in (path.parent, Path("runs")) for file in place.glob("*/recipe.yaml")})
    more = ", ..." if len(found) > SHOWN_RUNS else ""
    near = nearest_folder(path)
    if near and near not in found:
        there = f"; the nearest is {near}"
    elif found:
        there = f"; there are: {', '.join(map(str, found[:SHOWN_RUNS]))}{more}"
    else:
        there = "; `finetune run RECIPE` makes one"
    return ArtifactError(f"{path}: no such run or folder{there}")


def nearest_folder(path: Path) -> Path | None:
    """The folder beside a path that isn't there with the most similar name."""
    near = nearest(path.name, folders_beside(path))
    return path.parent / near if near else None


def folders_beside(path: Path) -> list[str]:
    """Their names, sorted."""
    with suppress(OSError):
        return sorted(one.name for one in path.parent.iterdir() if one.is_dir() and not one.name.startswith("."))
    return []


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error. An earlier one stays whole until
    then; whatever interrupts the exchange, one of the two remains.
    """
    partial, old = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():  # the exchange was interrupted
        os.replace(old, path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    to_disk(partial)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def to_disk(folder: Path) -> None:
    """Wait until all that the folder holds is on the disk: names that appear before it would survive a power cut, their
    content wouldn't.
    """
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; on Windows folders can't be waited for."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives and FUSE
            raise
    finally:
        os.close(descriptor)


def write_hashes(folder: Path) -> None:
    """Write HASHES, the SHA-256 of every file in the folder, when all of them are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    write_json(folder / HASHES, {path.relative_to(folder).as_posix(): file_hash(path) for path in files})


def damage(folder: Path) -> str | None:
    """The first file that isn't as `write_hashes` found it, and what is wrong with it; None if all are."""
    try:
        hashes = read_json(folder / HASHES)
    except ArtifactError as error:
        return str(error)
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if file_hash(folder / name) != expected:
            return f"{folder / name} isn't as it was written"
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> JsonObject:
    """Raises ArtifactError if the file is missing or isn't a JSON object."""
    try:
        content: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ArtifactError(
            f"{path} is damaged: {type(content).__name__} in place of an object; pull the model again, or make it again"
        )
    return content


def of_another_version(folder: Path) -> str:
    """What an error about a run's files has to add; '' where the kit of this version has trained the run."""
    path = folder / "versions.json"
    try:
        theirs = read_json(path).get(DISTRIBUTION, VERSION) if path.is_file() else VERSION
    except ArtifactError:
        return ""
    if theirs == VERSION:
        return ""
    return f" (the run is of {DISTRIBUTION} {theirs}, this is {VERSION}: use that version, or train anew)"


def damaged(path: Path | str, error: ValidationError, advice: str, above: str = "") -> ArtifactError:
    """What to raise for a JSON file that isn't as its schema says: its first wrong key. `above`: the key of the
    section that was validated, with a dot.
    """
    first = error.errors(include_url=False)[0]
    key = above + ".".join(map(str, first["loc"]))
    found = f"{path} is damaged: {f'{key}: ' if key else ''}{first['msg']}; {advice}"
    return ArtifactError(found + of_another_version(Path(path).parent))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[str]:
    """Of a file that `add_lines` writes; none where there isn't one."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def add_lines(path: Path, lines: Iterable[str]) -> None:
    """Those that the file lacks."""
    write_text(path, "\n".join(dict.fromkeys([*read_lines(path), *lines])) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


@contextmanager
def replacing(path: Path, encoding: str = "utf-8", **options: Any) -> Iterator[TextIO]:
    """A text file that takes the place of `path` once it is whole and on the disk. `options`: of `open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding=encoding, **options) as file:
        yield file
    flush(partial)
    os.replace(partial, path)
