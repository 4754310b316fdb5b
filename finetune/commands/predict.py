"""Predict: a trained model's answers to new rows, written to a table as they come."""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands._answers_file import AnswersFile, PredictedRow, refuse_other_suffixes
from finetune.commands._asking import ask_each, source_of_run, task_of
from finetune.common import display
from finetune.common.errors import DataError, MissingColumn, RecipeError, option
from finetune.common.run_folder import RunFolder, RunLike
from finetune.data.new_files import RowsAs, file_like
from finetune.data.questions import Input, question_about_media, question_of, read_inputs
from finetune.data.sample import KINDS, Answer, Message
from finetune.model.bindings import TaskBinding
from finetune.model.trained_for import parts_at, refuse_missing
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import RowFile

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant

SHOWN_ROWS = 20  # in notebooks


@dataclass(frozen=True)
class Predictions:
    """`rows` in the order of the input. `out`: the file that they are in. `left_out`: files in folders that are no
    media of this model.
    """

    rows: tuple[PredictedRow, ...]
    out: Path | None = None
    left_out: tuple[Path, ...] = ()

    @property
    def errors(self) -> list[PredictedRow]:
        """The rows without an answer."""
        return [row for row in self.rows if row.error]

    def _repr_html_(self) -> str:
        cells = [
            (row.row, row.answer_text, f"{max(row.probabilities.values()):.3f}" if row.probabilities else "", row.error)
            for row in self.rows[:SHOWN_ROWS]
        ]
        line = display.line(f"{len(self.rows):,} rows, {len(self.errors):,} without an answer")
        return line + display.table(("row", "answer", "probability", "error"), cells, left=True)


def predict(
    run: RunLike,
    inputs: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    task: str | None = None,
    prompt: str | None = None,
    columns: Mapping[str, str] | None = None,
    options: "PredictOptions | None" = None,
) -> Predictions:
    """Answer new rows with a run, merged or adapter folder, or a model of the Hub, and write them to `out`, a .csv or
    .jsonl, a batch at a time. Called again after an interruption it goes on; rows with an error are then tried again.

    `inputs`: media files, folders of them, or files of rows, with the columns that the task names and no answers.
    `task`: the name of one of several tasks that the model was trained for. `prompt`: in place of the task's question.
    `columns`: the task's column -> the file's column, by default as in the run's recipe. Rows that can't be
    answered are passed over, with their reason, unless it is the same for all.
    Raises RecipeError, DataError for inputs that can't be read at all and for an `out` that is finished or another
    file; ArtifactError, ModelError for the model.
    """
    options = options or PredictOptions()
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    for path in paths:
        if not path.exists():
            raise RecipeError(f"{path}: no such file or folder")
    if out is not None:
        refuse_other_suffixes(Path(out))
    refuse_missing(run)
    assistant, parts = None, parts_at(run)
    if parts and parts.bindings:
        bindings, limits = parts.bindings, parts.media
    else:  # only the loaded model tells what it takes
        assistant = _loaded(run)
        bindings, limits = assistant.model.bindings, assistant.limits
    name, trained_for = task_of(bindings, task)
    kinds = trained_for.media if trained_for else tuple(assistant.encoders if assistant else ())
    known, rows_as = source_of_run(RunFolder(run), name), RowsAs(columns, options.media_folder, options.encoding)

    def source_of(path: Path) -> RowFile:
        return file_like(known or RowFile(path=path), path, rows_as)

    rows, left_out = read_inputs(paths, kinds, source_of, limits.max_bytes)
    if trained_for is not None:
        refuse_hopeless(rows, trained_for, prompt)
    file, done = None, {}
    if out is not None:  # refused before the model is loaded, which takes long
        labels = _labels(bindings[name] if name else None)
        file = AnswersFile(Path(out), rows, labels, partial(_answer_of, trained_for), _ranks(trained_for))
        done = {} if options.overwrite else file.answered()
    questions = Questions(assistant or _loaded(run), name, trained_for, prompt, options)
    if file is None:
        answered = list(questions.answered(rows, len(rows)))
        return Predictions(tuple(ranked(answered, rows, trained_for)), None, tuple(left_out))
    with file.appending(list(done.values())) as append:
        for row in questions.answered([one for one in rows if one.name not in done], len(rows)):
            append(row)
            done[row.row] = row
    ordered = ranked([done[one.name] for one in rows], rows, trained_for)
    if ordered != [*done.values()]:  # ranks are known now; rows that had an error stood before others
        with file.appending(ordered):
            pass
    return Predictions(tuple(ordered), file.path, tuple(left_out))


@dataclass(frozen=True)
class PredictOptions:
    """`batch`: rows asked at once; `max_new_tokens`: of an answer in words; `media_folder`: of the media that tables
    name, by default the table's; `encoding`: of tables, by default the recipe's where they have it, else detected;
    `overwrite`: begin anew where `out` is there.
    """

    batch: int = 16
    max_new_tokens: int = 64
    media_folder: Path | None = None
    overwrite: bool = False
    encoding: str | None = None


class Questions:
    """Rows as questions to a model, answered batch by batch. Raises RecipeError, DataError."""

    def __init__(
        self,
        assistant: "Assistant",
        name: str | None,
        task: TaskPart | None,
        prompt: str | None,
        options: PredictOptions,
    ) -> None:
        self.assistant, self.name, self.task, self.prompt = assistant, name, task, prompt
        self.batch, self.max_new_tokens = options.batch, options.max_new_tokens

    def answered(self, rows: Sequence[Input], total: int) -> Iterator[PredictedRow]:
        """The rows with their answers or errors; `total` counts those that were answered before."""
        from finetune.common.progress import bar

        with bar("answers", total, total - len(rows)) as step:
            for start in range(0, len(rows), self.batch):
                for row in self._batch(rows[start : start + self.batch]):
                    yield row
                    step()

    def _batch(self, rows: Sequence[Input]) -> list[PredictedRow]:
        predicted: dict[str, PredictedRow] = {}
        questions: dict[str, tuple[Message, ...]] = {}
        for one in rows:
            try:
                questions[one.name] = self._question(one)
            except DataError as error:
                predicted[one.name] = _failed(one, error)
        answers = ask_each(self.assistant, self.name, questions, max_new_tokens=self.max_new_tokens)
        for one in rows:
            if one.name in answers:
                predicted[one.name] = self._predicted(one, answers[one.name])
        return [predicted[one.name] for one in rows]

    def _question(self, one: Input) -> tuple[Message, ...]:
        """Raises DataError."""
        if self.task is None:
            return question_about_media(one.row, self.prompt)
        return question_of(one.row, self.task, self.prompt).question

    def _predicted(self, one: Input, answer: Answer | DataError) -> PredictedRow:
        if isinstance(answer, DataError):
            return _failed(one, answer)
        return PredictedRow(one.name, one.columns, *_read(answer, self.task))


def _ranks(task: TaskPart | None) -> bool:
    return task is not None and hasattr(task.module, "group_of")


def ranked(rows: Sequence[PredictedRow], inputs: Sequence[Input], task: TaskPart | None) -> list[PredictedRow]:
    """The rows with their ranks in their groups, if the task has such: equal answers have the same, the best of theirs.
    Rows without a number as their answer have none.
    """
    if task is None or not _ranks(task):
        return [*rows]
    groups = [
        (one.row.path, "" if row.error else task.module.group_of(one.row, task.options))
        for one, row in zip(inputs, rows, strict=True)
    ]
    answers: dict[tuple[Path, str], list[float]] = defaultdict(list)
    for row, group in zip(rows, groups, strict=True):
        if isinstance(row.answer, int | float):
            answers[group].append(-row.answer)
    for numbers in answers.values():
        numbers.sort()
    return [
        replace(row, rank=1 + bisect_left(answers[group], -row.answer)) if isinstance(row.answer, int | float) else row
        for row, group in zip(rows, groups, strict=True)
    ]


def _labels(binding: TaskBinding | None) -> tuple[str, ...]:
    """The labels that get probabilities."""
    known = binding.settings.labels if binding else ()
    if binding is None or not known:
        return ()
    return tuple(_read(Answer(known[0], dict.fromkeys(known, 1 / len(known))), binding.task)[1])


def _read(answer: Answer, task: TaskPart | None) -> tuple[Any, Mapping[str, float]]:
    """(the answer as the task reads it, or as it was written where it can't; each label's probability)."""
    value = None if task is None else task.read(answer)
    if isinstance(value, dict) and value.keys() == {"label", "probabilities"} and answer.probabilities is not None:
        return value["label"], value["probabilities"]
    return answer.text if value is None else value, {}


def _answer_of(task: TaskPart | None, text: str) -> Any:
    """An answer from the text that stands for it in a table."""
    if task is None or isinstance(task.read(Answer("1")), str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _failed(one: Input, error: DataError) -> PredictedRow:
    return PredictedRow(one.name, one.columns, error=_reason(one, error))


def _reason(one: Input, error: DataError) -> str:
    if not isinstance(error, MissingColumn):
        return str(error).removeprefix(f"{one.row.where}: ")
    if not one.columns:
        return f"a file of {next(iter(one.row.columns))}, but the task reads {error.column!r}: name a table of rows"
    ours = error.column
    named = one.row.names.get(ours, ours)
    missing = f"no column {named!r}" + (f", which would be the task's {ours!r}" if named != ours else "")
    which = option(f"--columns {ours}=NAME", f"columns={{{ours!r}: 'NAME'}}")
    return f"{missing} (columns: {', '.join(map(repr, one.row.columns))[:300]}); say which it is with {which}"


def refuse_hopeless(rows: Sequence[Input], task: TaskPart, prompt: str | None) -> None:
    """Raises DataError where no row can be asked about, and all for the same reason."""
    reasons: list[str] = []
    for one in rows:
        try:
            question_of(one.row, task, prompt)
            return
        except DataError as error:
            reasons.append(_reason(one, error))
        if _without_names(one, reasons[-1]) != _without_names(rows[0], reasons[0]):
            return
    alike = f", as in all {len(rows):,} rows" if len(rows) > 1 else ""
    where = f"; name their folder with {option('--media-folder', 'media_folder=')}" if "no such" in reasons[0] else ""
    raise DataError(f"{rows[0].name}{alike}: {reasons[0]}{where if rows[0].columns else ''}")


def _without_names(one: Input, reason: str) -> str:
    """A reason that is the same for rows that name other files."""
    for name in filter(None, (one.row.columns.get(kind) for kind in KINDS)):
        reason = reason.replace(str(name), "")
    return reason


def _loaded(run: RunLike) -> "Assistant":
    from finetune.common.progress import quiet_libraries
    from finetune.model.load import load

    quiet_libraries()
    return load(run)
