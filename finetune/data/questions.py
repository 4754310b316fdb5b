"""Rows whose answers aren't known, or aren't to be read: media files, folders of them, and files of rows."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError, MissingColumn
from finetune.data.formats._media import is_hidden, kind_of
from finetune.data.read import detected, read_rows
from finetune.data.rows import error_list
from finetune.data.sample import KINDS, Message, Row, Sample, texts_in
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import RowFile


@dataclass(frozen=True)
class Input:
    """A row to be asked about. `name`: its file, or for a row of a table the table's name and the line, with the
    table's path where several have one name. `columns`: the texts and numbers that its table holds, as text.
    """

    name: str
    row: Row
    columns: dict[str, str]


def question_of(row: Row, task: TaskPart, prompt: str | None = None) -> Sample:
    """The question of a row that may lack an answer; the sample's own answer says nothing. `prompt`: in place of the
    task's, or of the row's question where each row has its own. Raises DataError.
    """
    options: Any = task.options
    changed: dict[str, Any] = {"transcript": ""} if hasattr(options, "transcript") else {}
    columns = row.columns
    if prompt is not None:
        own_question = getattr(options, "question", "")
        if own_question or not hasattr(options, "prompt"):
            columns = columns | {own_question or "prompt": prompt}
        else:
            changed["prompt"] = prompt
    asked = replace(task, options=options.model_copy(update=changed))
    columns = columns | task.module.stand_in(replace(row, columns=columns), asked.options)
    sample: Sample = asked.sample(replace(row, columns=columns))
    return sample


@dataclass(frozen=True)
class Wording:
    """A typed question as a task puts it: its `text`, and the `columns` that stand before it in trained questions."""

    text: str
    columns: tuple[str, ...]


def worded(prompt: str, task: TaskPart) -> Wording:
    """What a question about media, with `prompt` in place of the task's, says besides the media. A chat's stays as it
    is.
    """
    if not hasattr(task.options, "prompt"):
        return Wording(prompt, ())
    mark = "\0"
    textual = replace(task, options=task.options.model_copy(update={"media": ()}))
    columns: dict[str, str] = {}
    while True:
        try:
            (question,) = question_of(Row(Path("question"), 0, dict(columns), Path()), textual, prompt).question
        except MissingColumn as error:
            columns[error.column] = mark
            continue
        except DataError:  # nothing is asked
            return Wording(prompt, tuple(columns))
        lines = "\n".join(texts_in([question])).split("\n")
        text = "\n".join(line for line in lines if line != mark)
        typed = text.removeprefix(prompt).strip() in prompt  # all of it, by one who knows the task
        return Wording(prompt if typed else text, tuple(columns))


def question_about_media(row: Row, prompt: str | None = None) -> tuple[Message, ...]:
    """For a model that was trained for no known task: the row's media, then `prompt`. Raises DataError."""
    media = row.media([kind for kind in KINDS if row.columns.get(kind)])
    return (Message("user", (*media, *([prompt] if prompt else []))),)


def read_inputs(
    paths: Sequence[Path], kinds: Sequence[str], source_of: Callable[[Path], RowFile], max_bytes: int
) -> tuple[list[Input], list[Path]]:
    """(the rows of media files, of folders of media, and of files of rows; files of the folders that were left out).
    A folder is read with the folders in it. `kinds`: of the media that the model takes; `source_of`: how a file of
    rows is read; `max_bytes`: of embedded and downloaded media. Raises DataError.
    """
    named = Counter(path.name for path in paths)
    inputs: list[Input] = []
    left_out: list[Path] = []
    for path in paths:
        if path.is_file() and kind_of(path.name):
            inputs.append(_medium(path))
        elif path.is_dir() and not _holds_rows(path):
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            files = [file for file in files if not any(map(is_hidden, file.relative_to(path).parts))]
            media = [file for file in files if kind_of(file.name) in kinds]
            if not media:
                raise DataError(f"{path}: no {' or '.join(kinds) or 'medium'} in it, of {len(files):,} files")
            inputs += map(_medium, media)
            left_out += [file for file in files if kind_of(file.name) not in kinds]
        else:
            inputs += _rows(source_of(path), path.name if named[path.name] == 1 else str(path), max_bytes)
    if not inputs:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    twice = [name for name, count in Counter(one.name for one in inputs).items() if count > 1]
    if twice:
        raise DataError(error_list(twice, f"{len(twice)} rows or files are named twice; answer them in two files"))
    return inputs, left_out


def _medium(path: Path) -> Input:
    name = str(path).encode(errors="backslashreplace").decode()  # no table holds names that aren't UTF-8
    return Input(name, Row(path, 1, {str(kind_of(path.name)): path.absolute()}, path.parent), {})


def _rows(source: RowFile, name: str, max_bytes: int) -> list[Input]:
    """`name`: of the file, before the numbers of its rows."""
    inputs = []
    for row in read_rows(source, max_bytes):
        renamed = {ours for ours, theirs in source.columns.items() if theirs in row.columns and ours != theirs}
        kept = {name: value for name, value in row.columns.items() if name not in renamed}
        texts = {name: text for name, value in kept.items() if (text := _text(value)) is not None}
        inputs.append(Input(f"{name}:{row.number}", row, texts))
    return inputs


def _text(value: Any) -> str | None:
    """Text, a number, or a list of them as JSON; None for anything else, such as a picture's bytes."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, str | int | float | Path):
        return "" if value is None else str(value)
    return None


def _holds_rows(folder: Path) -> bool:
    """Whether a folder is one of rows, as a dataset on disk is, and not of media alone."""
    try:
        return detected(folder).kind != "folders"
    except DataError:
        return False
