"""From a folder of media to a file of rows, file by file, so that a call that was stopped goes on."""

from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.common import display
from finetune.common.errors import DataError, MediaError, RecipeError, option
from finetune.common.progress import bar
from finetune.data.describe.assignment import Assignment
from finetune.data.describe.options import DescribeOptions
from finetune.data.describe.rows_file import Origin, RowsFile
from finetune.data.formats._media import is_hidden, kind_of
from finetune.data.sample import Message, Row

MOST_FAILURES = 10  # successive files without an answer


@dataclass(frozen=True)
class ModelAnswer:
    """An answer, with the model and revision that gave it: see `Origin`."""

    text: str
    model: str
    revision: str = ""


class Describer(Protocol):
    """A model that answers prompts about media. `address`: of an endpoint, '' of a model in this process."""

    address: str

    def answers(self, questions: Mapping[str, Sequence[Message]]) -> Generator[tuple[str, ModelAnswer | DataError]]:
        """(name, answer) of each named question, in any order."""


@dataclass(frozen=True)
class Descriptions:
    """`out`: the file; `rows`: in it; `files`: described, `before` of them by earlier calls; `errors`: 'name: reason'
    of those that aren't.
    """

    out: Path
    media_folder: Path
    task: str
    rows: int
    files: int
    before: int
    errors: tuple[str, ...]

    @property
    def source(self) -> str:
        """A line for a recipe's `data:`."""
        folder = "" if self.media_folder == self.out.parent else f"media_folder: {self.media_folder}, "
        return f"- {{path: {self.out}, {folder}task: {self.task}, hold_out: 0.1}}"

    def __str__(self) -> str:
        before = f", {self.before:,} of them before" if self.before else ""
        return (
            f"{self.out}: {self.rows:,} rows about {self.files:,} files{before}; {len(self.errors):,} without an answer"
        )

    def _repr_html_(self) -> str:
        return display.line(str(self)) + display.preformatted(self.source)


@dataclass(frozen=True)
class MediaFolder:
    """`names` of a folder's files of one `kind`, relative to `root`, in their order."""

    root: Path
    kind: str
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, rows: Path, kinds: Sequence[str], wanted: str | None) -> "MediaFolder":
        """With the folders in it. `rows`: the folder of the file of rows, which is the root where it holds the media.
        Raises DataError, and RecipeError where there are several of `kinds` and none is wanted.
        """
        if not path.is_dir():
            raise RecipeError(f"{path}: no such folder; name one with media in it")
        around = path.resolve().is_relative_to(rows.resolve())
        root, inside = (rows, path.resolve().relative_to(rows.resolve())) if around else (path, Path())
        files: dict[str, list[str]] = {}
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            kind = kind_of(file.name)
            if kind and file.is_file() and not any(map(is_hidden, name.parts)):
                files.setdefault(kind, []).append((inside / name).as_posix())
        usable = [kind for kind in files if kind in kinds and kind == (wanted or kind)]
        if not usable:
            raise DataError(
                f"{path}: no {wanted or ' or '.join(kinds)} files in it; there are: {_counts(files) or 'none'}"
            )
        if len(usable) > 1:
            raise RecipeError(
                f"{path} holds {_counts(files)}: rows are of one kind; name it with {option('--media', 'media=')}"
            )
        return cls(root, usable[0], tuple(files[usable[0]]))


def _counts(files: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(names):,} {kind} files" for kind, names in files.items())


def describe(
    media: MediaFolder, out: Path, describer: Describer, assignment: Assignment, options: DescribeOptions
) -> Descriptions:
    """Describe each file that has no rows in `out` yet, and append these. Raises DataError where `out` is a file of
    something else, and where many files one after another get no answer.
    """
    file = RowsFile(out, media.kind, assignment)
    begun = [] if options.overwrite else file.begun()
    before = {row[media.kind] for row in begun}
    if other := next((name for name in before if name not in media.names), None):
        raise DataError(f"{out}: its file {other} isn't in the folder; name another with {option('--out', 'out=')}")
    prompt = assignment.wording(media.kind)
    questions, errors = _questions(media, before, prompt, options.limit)
    done, count, in_a_row = set(before), len(begun), 0
    with (
        file.appending(begun) as append,
        bar("files", len(questions) + len(before), len(before)) as step,
        closing(describer.answers(questions)) as answers,
    ):
        for name, answer in answers:
            try:
                if isinstance(answer, DataError):
                    raise answer
                rows = assignment.rows(media.kind, name, answer.text)
            except DataError as error:
                errors[name] = str(error)
                in_a_row += not isinstance(error, MediaError)
                if in_a_row == MOST_FAILURES:
                    raise DataError(
                        f"{in_a_row} files one after another without an answer, the last {name}: {error}; the answers "
                        f"so far are in {out}, and the same call goes on from there"
                    ) from None
            else:
                append(rows, Origin(answer.model, answer.revision, describer.address, prompt))
                done.add(name)
                count, in_a_row = count + len(rows), 0
            step()
    listed = tuple(f"{name}: {errors[name]}" for name in sorted(errors))
    return Descriptions(out, media.root, assignment.task, count, len(done), len(before), listed)


def _questions(
    media: MediaFolder, done: Set[str], prompt: str, limit: int | None
) -> tuple[dict[str, Sequence[Message]], dict[str, str]]:
    """(the prompt about each file that isn't done, the errors of others), both by name."""
    questions: dict[str, Sequence[Message]] = {}
    errors: dict[str, str] = {}
    for name in media.names[:limit]:
        if name in done:
            continue
        row = Row(media.root, 1, {media.kind: name}, media.root, file=name)
        try:
            name.encode()
            questions[name] = (Message("user", (*row.media([media.kind]), prompt)),)
        except UnicodeEncodeError:
            errors[ascii(name)] = "its name isn't UTF-8; rename it"
        except DataError as error:
            errors[name] = str(error).removeprefix(f"{row.where}: ")
    return questions, errors
