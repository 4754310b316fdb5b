"""Help with labelling: a trained run proposes, a person decides, in a CSV or on a page."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError, RecipeError
from finetune.common.registry import load_part
from finetune.data.check.page import picture_uri, sound_uri
from finetune.data.media import decode
from finetune.data.rows import Source, detected, listed, read_rows
from finetune.data.sample import KINDS, Medium, Message, Row
from finetune.data.sources import limits_of, sources_of
from finetune.model.asks import name_of
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Limits

COLUMNS = ("row", "media", "text", "proposed", "confidence", "label")
ASKED = ("label", "answer", "caption", "text")  # options of tasks that name the column of what is to be found
BUTTONS = 24  # labels; more stand in a list
HOST = "127.0.0.1"
INSTALL = "the page needs Gradio: pip install 'finetune[label]'; without --page the labels are written into a CSV"


@dataclass
class Item:
    """A row to be labelled: what is shown, what the model is asked, and the line that is saved."""

    media: tuple[Medium, ...]
    question: tuple[Message, ...]
    saved: dict[str, str]


@dataclass
class Labelling:
    """Rows, labels and the CSV they are kept in. Each decision is on disk when `decide` returns."""

    path: Path
    items: list[Item]
    labels: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(bool(item.saved["label"]) for item in self.items)

    def open_from(self, start: int) -> int:
        """The next row without a label from `start` on, round the end; `start` itself where all have one."""
        numbers = [(start + step) % len(self.items) for step in range(len(self.items))]
        return next((n for n in numbers if not self.items[n].saved["label"]), start)

    def decide(self, number: int, label: str) -> int:
        """Save a row's label ('' takes it back). Returns the next row that has none."""
        label = label.strip()
        self.items[number].saved["label"] = label
        if label and label not in self.labels:
            self.labels.append(label)
        self.save()
        return self.open_from((number + 1) % len(self.items) if label else number)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", encoding="utf-8-sig", newline="") as file:  # the mark lets Excel read Chinese
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(item.saved for item in self.items)
        os.replace(partial, self.path)


def data_label(
    rows: Path | str,
    run: Path | str | None = None,
    *,
    out: Path | str = "labels.csv",
    task: str | None = None,
    labels: Sequence[str] = (),
    batch: int = 16,
    max_new_tokens: int = 32,
    page: bool = False,
    port: int = 7860,
) -> dict[str, Any]:
    """Propose labels for the rows of a recipe or of a file, and write OUT with the columns row, media, text, proposed,
    confidence (where the model gives probabilities) and label, which a person fills in. A label that the rows hold
    already, or that OUT has from before, stays; rows that OUT has a proposal for aren't asked about again.

    `run`: run, merged or adapter folder; None: nothing is proposed. `task`: what it was trained for, by its name, where
    there are several. `labels`: those there are; else those that the task or the rows name. With `page` opens a page at
    http://127.0.0.1:PORT and returns when it is closed.

    Returns {"out": path, "rows", "proposed", "labelled": n}. Raises RecipeError, DataError, ArtifactError.
    """
    gradio = _gradio() if page else None
    assistant = None
    if run is not None:
        from finetune.model.load import load

        assistant = load(run)
    name, asked = _asked(assistant, task)
    items, known, limits = _items(Path(rows), name, asked)
    found = dict.fromkeys([*labels, *known, *(i.saved["label"] for i in items if i.saved["label"] and not labels)])
    labelling = Labelling(Path(out), items, list(found))
    _resume(labelling)
    if assistant is not None:
        propose(labelling, assistant, name, batch, max_new_tokens)
    labelling.save()
    if gradio is not None:
        theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none is fetched
        build_page(gradio, labelling, limits).launch(server_name=HOST, server_port=port, share=False, theme=theme)
    proposed = sum(bool(item.saved["proposed"]) for item in items)
    return {"out": labelling.path, "rows": len(items), "proposed": proposed, "labelled": labelling.done}


def propose(labelling: Labelling, assistant: Any, name: str | None, batch: int, max_new_tokens: int) -> None:
    """Ask about the rows that have neither label nor proposal, and save after each batch."""
    from finetune.common.progress import bar

    left = [item for item in labelling.items if not item.saved["label"] and not item.saved["proposed"]]
    if not left:
        return
    with bar("proposals", len(left)) as step:
        for start in range(0, len(left), batch):
            some = left[start : start + batch]
            questions = [item.question for item in some]
            if name is not None:
                answers = assistant.ask(name, questions, max_new_tokens=max_new_tokens)
                for item, answer in zip(some, answers, strict=True):
                    chances = answer.probabilities or {}
                    best = max(chances, key=chances.__getitem__) if chances else answer.text
                    item.saved["proposed"] = best if answer.number is None else f"{answer.number:g}"
                    item.saved["confidence"] = f"{chances[best]:.3f}" if chances else ""
            else:
                for item, text in zip(some, assistant.answers(questions, max_new_tokens=max_new_tokens), strict=True):
                    item.saved["proposed"] = text
            labelling.save()
            for _ in some:
                step()


def _asked(assistant: Any, task: str | None) -> tuple[str | None, tuple[str, Any] | None]:
    """(name, task) of what a model was trained for. Raises DataError where that isn't clear."""
    asks: Mapping[str, Any] = assistant.model.asks if assistant is not None else {}
    if task is not None and task not in asks:
        raise DataError(f"--task {task}: the model was trained for {', '.join(asks) or 'nothing that is known'}")
    if len(asks) > 1 and task is None:
        raise DataError(f"the model was trained for {', '.join(asks)}: name one with --task")
    name = task or next(iter(asks), None)
    return name, asks[name].task if name else None


def _items(path: Path, name: str | None, asked: tuple[str, Any] | None) -> tuple[list[Item], list[str], Limits]:
    """Rows of a recipe, asked as their sources say, or of a file, asked as the model was trained. And the labels that
    tasks name, and the bounds of media.
    """
    limits = Limits()
    if path.suffix.lower() in (".yaml", ".yml"):
        recipe = load_recipe(path)
        sources, limits = sources_of(recipe), limits_of(recipe)
        sources = [source for source in sources if name_of(source) == name] or sources
    elif path.exists():
        sources = [Source(path=path, task=asked or ("", None), format=detected(path))]
    else:
        raise RecipeError(f"{path}: no such file; name a recipe or a file of rows")
    items: list[Item] = []
    wrong: list[str] = []
    known: list[str] = []
    for source in sources:
        known += [label for label in getattr(source.task[1], "labels", ()) if label not in known]
        for row in read_rows(source):
            try:
                items.append(_item(row, source.task))
            except DataError as error:
                wrong.append(str(error))
    if wrong or not items:
        raise DataError(listed(wrong, f"{len(wrong)} rows can't be shown") if wrong else f"{path}: no rows")
    return items, known, limits


def _item(row: Row, task: tuple[str, Any]) -> Item:
    kind, options = task
    column = next((getattr(options, name) for name in ASKED if hasattr(options, name)), "label")
    given = str(row.columns.get(column) or "").strip()
    if kind:
        # Tasks refuse rows without an answer: any will do, for the question doesn't depend on it.
        stand_in = given or next(iter(getattr(options, "labels", ())), "?")
        sample = load_part("tasks", kind).sample(replace(row, columns=row.columns | {column: stand_in}), options)
        media, question = sample.media, sample.question
    else:
        media = row.media([kind for kind in KINDS if row.columns.get(kind)])
        question = (Message("user", media),)
    text = "\n".join(part for message in question for part in message.content if isinstance(part, str))
    if not text:
        others = (value for name, value in row.columns.items() if name not in (*KINDS, column))
        text = "\n".join(value for value in others if isinstance(value, str))
    saved = dict.fromkeys(COLUMNS, "") | {
        "row": row.where,
        "media": " | ".join(str(medium.path) for medium in media),
        "text": text,
        "label": given,
    }
    return Item(media, question, saved)


def _resume(labelling: Labelling) -> None:
    """Take over labels and proposals from an earlier file. Raises DataError where it is of other rows."""
    if not labelling.path.exists():
        return
    with labelling.path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(COLUMNS):
            raise DataError(f"{labelling.path}: there already, and not a file of labels; name another with --out")
        before = {(row["row"], row["media"]): row for row in reader}
    there = {(item.saved["row"], item.saved["media"]) for item in labelling.items}
    if strange := before.keys() - there:
        raise DataError(
            f"{labelling.path}: holds {len(strange)} rows that aren't among these ({min(strange)[0]}); name another "
            "with --out"
        )
    for item in labelling.items:
        old = before.get((item.saved["row"], item.saved["media"]), {})
        for column in ("proposed", "confidence", "label"):
            item.saved[column] = (old.get(column) or "").strip() or item.saved[column]
        if item.saved["label"] and item.saved["label"] not in labelling.labels:
            labelling.labels.append(item.saved["label"])


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise RecipeError(INSTALL) from None
    return gradio


def shown(item: Item, limits: Limits) -> str:
    """HTML of a row's media, self-contained. What can't be decoded is told in its place."""
    from html import escape

    pieces = []
    for medium in item.media:
        sampling: dict[str, Any] = {"count": 6} if medium.kind == "video" else {}
        try:
            decoded = decode(medium.kind, medium.path, limits=limits, **sampling)
        except DataError as error:
            pieces.append(f"<p><b>{escape(str(error))}</b></p>")
            continue
        name = escape(medium.path.name, quote=True)
        if medium.kind == "audio":
            pieces.append(f'<audio controls style="width:100%" title="{name}" src="{sound_uri(decoded, 120)}"></audio>')
            continue
        for frame in decoded.frames if medium.kind == "video" else [decoded]:
            side = 240 if medium.kind == "video" else 720
            pieces.append(f'<img alt="{name}" style="max-height:60vh;max-width:100%" src="{picture_uri(frame, side)}">')
    return f'<div style="text-align:center">{"".join(pieces)}</div>'


def build_page(gradio: Any, labelling: Labelling, limits: Limits) -> Any:
    """The page: the row's media and text, the proposal, a button for each label, a field for a new one."""

    def view(number: int) -> list[Any]:
        item = labelling.items[number]
        saved = item.saved
        confidence = f" ({float(saved['confidence']):.0%})" if saved["confidence"] else ""
        head = f"**{labelling.done:,} of {len(labelling.items):,}** labelled · {saved['row']}"
        said = f"proposed: **{saved['proposed']}**{confidence}" if saved["proposed"] else "nothing proposed"
        now = f" · label: **{saved['label']}**" if saved["label"] else ""
        return [number, head, shown(item, limits), saved["text"], said + now, saved["label"] or saved["proposed"]]

    def decide(label: str, number: int) -> list[Any]:
        return view(labelling.decide(number, label))

    def step(by: int, number: int) -> list[Any]:
        return view((number + by) % len(labelling.items))

    with gradio.Blocks(title=f"Labels: {labelling.path.name}", analytics_enabled=False) as blocks:
        number = gradio.State(labelling.open_from(0))
        head = gradio.Markdown()
        media = gradio.HTML()
        text = gradio.Textbox(label="text", interactive=False, lines=1)
        said = gradio.Markdown()
        field = gradio.Textbox(label="another label", interactive=True)
        parts = [number, head, media, text, said, field]
        if len(labelling.labels) <= BUTTONS:
            with gradio.Row():
                for label in labelling.labels:
                    button = gradio.Button(label)
                    button.click(lambda number, label=label: decide(label, number), number, parts)
        else:
            choice = gradio.Dropdown(labelling.labels, label="label", value=None)
            choice.input(lambda label, number: decide(label or "", number), [choice, number], parts)
        with gradio.Row():
            gradio.Button("Save what is written", variant="primary").click(decide, [field, number], parts)
            gradio.Button("Back").click(lambda number: step(-1, number), number, parts)
            gradio.Button("Skip").click(lambda number: step(1, number), number, parts)
        field.submit(decide, [field, number], parts)
        blocks.load(lambda: view(labelling.open_from(0)), None, parts)
    return blocks
