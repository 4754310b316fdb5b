"""Predict: a trained model's answers to new rows, written to a table as they come."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetune.commands._answers_file import AnswersFile, PredictedRow, refuse_other_suffixes
from finetune.commands._asking import ask, task_of
from finetune.common import display
from finetune.common.errors import DataError, MissingColumn, RecipeError, option
from finetune.common.run_folder import RunFolder
from finetune.data.new_files import RowsAs, file_like
from finetune.data.questions import Input, question_about_media, question_of, read_inputs
from finetune.data.sample import Answer, Medium, Message
from finetune.model.trained_for import bindings_at, refuse_missing
from finetune.recipe.load import Recipe
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import RowFile, Source, task_names
from finetune.recipe.yaml_reader import read_text, read_yaml

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
        return line + display.table(("row", "answer", "probability", "error"), cells)


def predict(
    run: Path | str,
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
    assistant, bindings = None, bindings_at(run)
    if not bindings:  # only the loaded model tells what it takes
        assistant = _loaded(run)
        bindings = assistant.model.bindings
    name, trained_for = task_of(bindings, task)
    kinds = trained_for.media if trained_for else tuple(assistant.encoders if assistant else ())
    known, rows_as = _source(RunFolder(run), name), RowsAs(columns, options.media_folder, options.encoding)

    def source_of(path: Path) -> RowFile:
        return file_like(known or RowFile(path=path), path, rows_as)

    rows, left_out = read_inputs(paths, kinds, source_of)
    if trained_for is not None:
        refuse_hopeless(rows, trained_for, prompt)
    questions = Questions(assistant or _loaded(run), name, trained_for, prompt, options)
    if out is None:
        return Predictions(tuple(questions.answered(rows, len(rows))), None, tuple(left_out))
    file = AnswersFile(Path(out), rows, questions.labels, questions.answer_of)
    done = {} if options.overwrite else file.answered()
    with file.appending(list(done.values())) as append:
        for row in questions.answered([one for one in rows if one.name not in done], len(rows)):
            append(row)
            done[row.row] = row
    ordered = [done[one.name] for one in rows]
    if ordered != [*done.values()]:  # rows that had an error stood before others
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

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that get probabilities."""
        known = self.assistant.model.bindings[self.name].settings.labels if self.name else ()
        return tuple(self._read(Answer(known[0], dict.fromkeys(known, 1 / len(known))))[1]) if known else ()

    def answered(self, rows: Sequence[Input], total: int) -> Iterator[PredictedRow]:
        """The rows with their answers or errors; `total` counts those that were answered before."""
        from finetune.common.progress import bar

        with bar("answers", total, total - len(rows)) as step:
            for start in range(0, len(rows), self.batch):
                for row in self._batch(rows[start : start + self.batch]):
                    yield row
                    step()

    def _batch(self, rows: Sequence[Input]) -> list[PredictedRow]:
        from finetune.model.assistant import FileView

        view = FileView(self.assistant.encoders, self.assistant.limits)
        predicted: dict[str, PredictedRow] = {}
        questions: dict[str, tuple[Message, ...]] = {}
        for one in rows:
            try:
                questions[one.name] = self._question(one, view)
            except DataError as error:
                predicted[one.name] = _failed(one, error)
        answers = self._answers(questions, view)
        for one in rows:
            if one.name in answers:
                predicted[one.name] = self._predicted(one, answers[one.name])
        return [predicted[one.name] for one in rows]

    def _question(self, one: Input, view: Any) -> tuple[Message, ...]:
        """Its media are decoded here, so that one that can't be doesn't spoil its batch. Raises DataError."""
        asked = self.task
        question = question_about_media(one.row, self.prompt) if asked is None else None
        if asked is not None:
            question = question_of(one.row, asked, self.prompt).question
        media = [part for message in question or () for part in message.content if isinstance(part, Medium)]
        for medium in media:
            if medium.kind not in self.assistant.encoders:
                kinds = ", ".join(self.assistant.encoders) or "text only"
                raise DataError(f"holds {medium.kind}, but this model reads {kinds}")
            view.layout(medium)
        return question or ()

    def _answers(self, questions: Mapping[str, tuple[Message, ...]], view: Any) -> dict[str, Answer | DataError]:
        """As one batch; if that is refused, one by one, as a single question may be too long."""
        if not questions:
            return {}
        conversations = list(questions.values())
        try:
            given = ask(self.assistant, self.name, conversations, max_new_tokens=self.max_new_tokens, view=view)
            return dict(zip(questions, given, strict=True))
        except DataError as error:
            if len(questions) == 1:
                return dict.fromkeys(questions, error)
        return {key: self._answers({key: question}, view)[key] for key, question in questions.items()}

    def _predicted(self, one: Input, answer: Answer | DataError) -> PredictedRow:
        if isinstance(answer, DataError):
            return _failed(one, answer)
        return PredictedRow(one.name, one.columns, *self._read(answer))

    def _read(self, answer: Answer) -> tuple[Any, Mapping[str, float]]:
        """(the answer as the task reads it, or as it was written where it can't; each label's probability)."""
        value = None if self.task is None else self.task.read(answer)
        if isinstance(value, dict) and value.keys() == {"label", "probabilities"} and answer.probabilities is not None:
            return value["label"], value["probabilities"]
        return answer.text if value is None else value, {}

    def answer_of(self, text: str) -> Any:
        """An answer from the text that stands for it in a table."""
        if self.task is None or isinstance(self.task.read(Answer("1")), str):
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
    reasons: set[str] = set()
    for one in rows:
        try:
            question_of(one.row, task, prompt)
            return
        except DataError as error:
            reasons.add(_reason(one, error))
        if len(reasons) > 1:
            return
    alike = f", as in all {len(rows):,} rows" if len(rows) > 1 else ""
    raise DataError(f"{rows[0].name}{alike}: {reasons.pop()}")


def _loaded(run: Path | str) -> "Assistant":
    from finetune.common.progress import quiet_libraries
    from finetune.model.load import load

    quiet_libraries()
    return load(run)


def _source(run: RunFolder, task: str | None) -> Source | None:
    """The first source of a task in a run's recipe; None where there is no recipe, or one that can't be read."""
    if not run.recipe.is_file():
        return None
    with suppress(RecipeError, ValidationError):
        recipe = Recipe.without_files(read_yaml(read_text(str(run.recipe)), str(run.recipe)).value)
        return next((s for s, name in zip(recipe.data, task_names(recipe.data), strict=True) if name == task), None)
    return None
