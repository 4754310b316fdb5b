"""Help with labelling: a trained run proposes, a person decides, in a CSV or on a page."""

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.commands._asking import ask_each, source_of_run, task_of
from finetune.common import display
from finetune.common.errors import DataError, RecipeError, option
from finetune.common.run_folder import RunFolder, RunLike, replacing
from finetune.data.check.page import InlineMedium, embedded, render
from finetune.data.describe.review import ReviewedRows
from finetune.data.describe.rows_file import is_described
from finetune.data.new_files import RowsAs, file_like
from finetune.data.questions import question_about_media, question_of
from finetune.data.read import read_rows
from finetune.data.rows import error_list
from finetune.data.sample import KINDS, Medium, Message, Row, media_in, texts_in
from finetune.recipe.load import Recipe, RecipeLike, as_recipe
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import Limits, RowFile, Source, task_names

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant

ANSWER_COLUMNS = ("label", "answer", "caption", "text")  # options of tasks that name the column of the answer
BUTTONS = 24  # labels; more are a list
HOST = "127.0.0.1"
OUT = "labels.csv"
REJECT = "reject this row"
INSTALL = "the page needs Gradio: pip install 'finetune-kit[label]'; without {} the labels are written into a CSV"


@dataclass
class Line:
    """A line of the CSV. `row`: file and line; `media`: paths; `proposed`, `confidence`: by the model; `label`: by a
    person.
    """

    row: str
    media: str
    text: str
    proposed: str = ""
    confidence: str = ""
    label: str = ""


COLUMNS = [column.name for column in fields(Line)]


@dataclass
class Item:
    """A row to be labelled: its media, the question to the model, and its line of the CSV."""

    media: tuple[Medium, ...]
    question: tuple[Message, ...]
    line: Line


@dataclass(frozen=True)
class LabelResult:
    """The CSV, and how many rows it has, with a proposal, with a label."""

    out: Path
    rows: int
    proposed: int
    labelled: int

    def __str__(self) -> str:
        return f"{self.out}: {self.rows:,} rows, {self.proposed:,} proposals, {self.labelled:,} labels"

    def _repr_html_(self) -> str:
        return display.line(str(self))


@dataclass
class Labelling:
    """Rows, labels and the CSV that they are saved in. Each decision is on disk when `decide` returns."""

    path: Path
    items: list[Item]
    labels: list[str] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    save_words: ClassVar[str] = "Save the written label"
    field_words: ClassVar[str] = "another label"

    @property
    def done(self) -> int:
        return sum(bool(item.line.label) for item in self.items)

    def open_from(self, start: int) -> int:
        """The next row without a label from `start` on, wrapping around; `start` itself if all have one."""
        numbers = [(start + step) % len(self.items) for step in range(len(self.items))]
        return next((n for n in numbers if not self.items[n].line.label), start)

    def decide(self, number: int, label: str) -> int:
        """Save a row's label; '' removes it. Returns the next row without one."""
        label = label.strip()
        self.items[number].line.label = label
        if label and label not in self.labels:
            self.labels.append(label)
        self.save()
        return self.open_from((number + 1) % len(self.items) if label else number)

    def save(self) -> None:
        with replacing(self.path, "utf-8-sig", newline="") as file:  # Excel reads UTF-8 with its mark
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(asdict(item.line) for item in self.items)


@dataclass
class Review(Labelling):
    """Rows that a model has described. `path`: of those that a person has kept."""

    reviewed: ReviewedRows = field(kw_only=True)
    save_words = "Accept, as it stands above"
    field_words = "answer, to be edited"

    @classmethod
    def of(cls, described: Path, out: Path) -> "Review":
        """Raises DataError."""
        if out.suffix.lower() != ".jsonl" or out.resolve() == described.resolve():
            raise DataError(f"{out}: for the rows you keep, write another .jsonl file than {described.name}")
        reviewed = ReviewedRows(described, out)
        folder = file_like(RowFile(path=described), described, RowsAs()).folder_of_media
        items = []
        for number, line in enumerate(reviewed.lines):
            kind, name = reviewed.medium(number)
            (medium,) = Row(described, line, {kind: name}, folder).media([kind])
            shown = Line(f"{described.name}:{line}", str(medium.path), reviewed.question(number))
            items.append(Item((medium,), (), shown))
        review = cls(out, items, [REJECT], reviewed=reviewed)
        for number in range(len(items)):
            review._show(number)
        return review

    def _show(self, number: int) -> None:
        line, decision = self.items[number].line, self.reviewed.decision(number)
        line.proposed = self.reviewed.proposed(number)
        line.label = REJECT if decision == "rejected" else self.reviewed.answer(number) if decision else ""

    def decide(self, number: int, label: str) -> int:
        label = label.strip()
        self.reviewed.decide(number, None if label == REJECT else label)
        self._show(number)
        return self.open_from((number + 1) % len(self.items) if label else number)

    def save(self) -> None:
        self.reviewed.save()


def data_label(
    rows: RecipeLike,
    run: RunLike | None = None,
    *,
    out: Path | str | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    batch: int = 16,
    max_new_tokens: int = 32,
    page_port: int | None = None,
) -> LabelResult:
    """Propose labels for the rows of a recipe or of a file, and write OUT, default labels.csv, with the columns row,
    media, text, proposed, confidence (if the model gives probabilities) and label, which a person fills in. Labels in
    the rows and in an earlier OUT stay; rows that have a proposal in OUT don't get another.

    Of rows that `data_describe` has written, without a `run`, a person accepts, edits or rejects each on the page. The
    decision is kept in the row, and OUT, default NAME-reviewed.jsonl, has the rows that were accepted or edited.

    `run`: run, merged or adapter folder; None: nothing is proposed. `task`: the name of one of several tasks that it
    was trained for. `labels`: default: those that the task or the rows name. `page_port`: open a page at
    http://127.0.0.1:PAGE_PORT and return when it is closed. Raises RecipeError, DataError, ArtifactError.
    """
    gradio = _gradio() if page_port is not None else None
    if run is None and not isinstance(rows, Recipe) and is_described(described := Path(rows)):
        review = Review.of(described, Path(out or described.with_name(f"{described.stem}-reviewed.jsonl")))
        return _labelled(review, gradio, page_port)
    assistant = None
    if run is not None:
        from finetune.model.load import load

        assistant = load(run)
    name, trained_for = task_of(assistant.model.bindings if assistant else {}, task)
    known = source_of_run(RunFolder(Path(run)), name) if run is not None else None
    labelling = read_rows_to_label(rows, Path(out or OUT), name, trained_for, labels, known)
    _resume(labelling)
    if assistant is not None:
        propose(labelling, assistant, name, batch, max_new_tokens)
    return _labelled(labelling, gradio, page_port)


def _labelled(labelling: Labelling, gradio: Any, page_port: int | None) -> LabelResult:
    labelling.save()
    if gradio is not None:
        theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no downloads
        build_page(gradio, labelling).launch(server_name=HOST, server_port=page_port, share=False, theme=theme)
    proposed = sum(bool(item.line.proposed) for item in labelling.items)
    return LabelResult(labelling.path, len(labelling.items), proposed, labelling.done)


def propose(labelling: Labelling, assistant: "Assistant", name: str | None, batch: int, max_new_tokens: int) -> None:
    """Add the model's answers to the rows that have neither label nor proposal, saving after each batch. Rows that
    can't be asked about are passed over, and printed with their reasons.
    """
    from finetune.common.progress import bar, console

    without: list[str] = []
    open_items = [item for item in labelling.items if not item.line.label and not item.line.proposed]
    if not open_items:
        return
    with bar("proposals", len(open_items)) as step:
        for start in range(0, len(open_items), batch):
            items = open_items[start : start + batch]
            questions = {str(number): item.question for number, item in enumerate(items)}
            answers = ask_each(assistant, name, questions, max_new_tokens=max_new_tokens)
            for number, item in enumerate(items):
                step()
                answer = answers[str(number)]
                if isinstance(answer, DataError):
                    without.append(f"{item.line.row}: {str(answer).removeprefix(f'{item.line.row}: ')}")
                    continue
                probabilities = answer.probabilities or {}
                best = max(probabilities, key=probabilities.__getitem__) if probabilities else answer.text
                item.line.proposed = best if answer.number is None else f"{answer.number:g}"
                item.line.confidence = f"{probabilities[best]:.3f}" if probabilities else ""
            labelling.save()
    if without:
        console.print(
            error_list(without, f"{len(without):,} row{'s' * (len(without) != 1)} without a proposal"),
            markup=False,
            soft_wrap=True,
        )


def read_rows_to_label(
    rows: RecipeLike,
    out: Path,
    name: str | None,
    trained_for: TaskPart | None,
    labels: Sequence[str],
    known: Source | None = None,
) -> Labelling:
    """The rows of a recipe, with the tasks of its sources (of those of task `name`, if there are any), or of a file,
    with the task that the model was trained for, read as its source `known` is. Raises DataError, RecipeError.
    """
    limits = Limits()
    files: list[tuple[RowFile, TaskPart | None]]
    if isinstance(rows, Recipe) or Path(rows).suffix.lower() in (".yaml", ".yml"):
        recipe = as_recipe(rows)
        limits, names = recipe.media, task_names(recipe.data)
        sources = [source for source, its_name in zip(recipe.data, names, strict=True) if its_name == name]
        files = [(source, source.task) for source in sources or recipe.data]
    elif (path := Path(rows)).exists():
        files = [(file_like(known or RowFile(path=path), path, RowsAs()), trained_for)]
    else:
        raise RecipeError(f"{path}: no such file; name a recipe or a file of rows")
    items: list[Item] = []
    errors: list[str] = []
    for file, task in files:
        for row in read_rows(file, limits.max_bytes):
            try:
                items.append(_item(row, task))
            except DataError as error:
                errors.append(str(error))
    if errors:
        raise DataError(error_list(errors, f"{len(errors)} unusable rows"))
    if not items:
        raise DataError(f"{rows.name if isinstance(rows, Recipe) else rows}: no rows")
    of_tasks = [label for _, task in files if task for label in getattr(task.options, "labels", ())]
    of_rows = [] if labels else [item.line.label for item in items if item.line.label]
    return Labelling(out, items, list(dict.fromkeys([*labels, *of_tasks, *of_rows])), limits)


def _item(row: Row, task: TaskPart | None) -> Item:
    options = task.options if task else None
    column = next((getattr(options, name) for name in ANSWER_COLUMNS if hasattr(options, name)), "label")
    label = str(row.columns.get(column) or "").strip()
    if task:
        sample = question_of(row, task)
        media, question = sample.media, sample.question
    else:
        question = question_about_media(row)
        media = tuple(media_in(question))
    text = "\n".join(texts_in(question))
    if not text:
        others = (value for name, value in row.columns.items() if name not in (*KINDS, column))
        text = "\n".join(value for value in others if isinstance(value, str))
    return Item(media, question, Line(row.where, " | ".join(str(medium.path) for medium in media), text, label=label))


def _resume(labelling: Labelling) -> None:
    """Take over labels and proposals of an earlier file. Raises DataError if it is of other rows."""
    if not labelling.path.exists():
        return
    with labelling.path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(COLUMNS):
            raise DataError(
                f"{labelling.path}: exists, and is not a file of labels; name another with {option('--out', 'out=')}"
            )
        before = {(row["row"], row["media"]): row for row in reader}
    lines = [item.line for item in labelling.items]
    if unknown := before.keys() - {(line.row, line.media) for line in lines}:
        raise DataError(
            f"{labelling.path}: holds {len(unknown)} rows that aren't among these ({min(unknown)[0]}); name another "
            f"with {option('--out', 'out=')}"
        )
    for line in lines:
        old = before.get((line.row, line.media), {})
        line.proposed = (old.get("proposed") or "").strip() or line.proposed
        line.confidence = (old.get("confidence") or "").strip() or line.confidence
        line.label = (old.get("label") or "").strip() or line.label
        if line.label and line.label not in labelling.labels:
            labelling.labels.append(line.label)


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise RecipeError(INSTALL.format(option("--page", "page_port="))) from None
    return gradio


def media_html(item: Item, limits: Limits) -> str:
    """HTML of a row's media, self-contained; of a medium that can't be decoded, the reason."""
    media: list[InlineMedium | str] = []
    for medium in item.media:
        side = 240 if medium.kind == "video" else 720
        try:
            media += embedded(medium.kind, medium.path, limits, side=side, seconds=120, frames=6)
        except DataError as error:
            media.append(str(error))
    return render("label.html", media=media)


def build_page(gradio: Any, labelling: Labelling) -> Any:
    """The page: a row's media and text, the proposal, a button for each label, a field for a new one."""

    def view(number: int) -> list[object]:
        item = labelling.items[number]
        line = item.line
        confidence = f" ({float(line.confidence):.0%})" if line.confidence else ""
        head = f"<b>{labelling.done:,} of {len(labelling.items):,}</b> labelled · {escape(line.row)}"
        state = f"proposed: <b>{escape(line.proposed)}</b>{confidence}" if line.proposed else "nothing proposed"
        state += f" · label: <b>{escape(line.label)}</b>" if line.label else ""
        return [number, head, media_html(item, labelling.limits), line.text, state, line.label or line.proposed]

    def decide(label: str, number: int) -> list[object]:
        return view(labelling.decide(number, label))

    def step(by: int, number: int) -> list[object]:
        return view((number + by) % len(labelling.items))

    with gradio.Blocks(title=f"Labels: {labelling.path.name}", analytics_enabled=False) as blocks:
        number = gradio.State(labelling.open_from(0))
        head = gradio.HTML()
        media = gradio.HTML()
        text = gradio.Textbox(label="text", interactive=False, lines=1)
        state = gradio.HTML()
        label_field = gradio.Textbox(label=labelling.field_words, interactive=True)
        parts = [number, head, media, text, state, label_field]
        if len(labelling.labels) <= BUTTONS:
            with gradio.Row():
                for label in labelling.labels:
                    button = gradio.Button(label)
                    button.click(lambda number, label=label: decide(label, number), number, parts)
        else:
            choice = gradio.Dropdown(labelling.labels, label="label", value=None)
            choice.input(lambda label, number: decide(label or "", number), [choice, number], parts)
        with gradio.Row():
            gradio.Button(labelling.save_words, variant="primary").click(decide, [label_field, number], parts)
            gradio.Button("Back").click(lambda number: step(-1, number), number, parts)
            gradio.Button("Skip").click(lambda number: step(1, number), number, parts)
        label_field.submit(decide, [label_field, number], parts)
        blocks.load(lambda: view(labelling.open_from(0)), None, parts)
    return blocks
