"""The task for a table's columns: which of them is the answer, and what is asked for it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from finetune.commands._init.columns import LABEL_NAMES, Column, Kind
from finetune.common.errors import RecipeError

Yaml: TypeAlias = dict[str, object]  # a part of a recipe, as it is written

ANSWERS = (  # names of columns that hold answers, the surest first
    *("label", "labels", "class", "category", "标签", "类别", "分类"),
    *("answer", "answers", "reply", "response", "答案", "回答", "回复"),
    *("caption", "captions", "description", "描述", "说明"),
    *("transcript", "transcription", "text", "sentence", "文本", "文字", "转写"),
    *("boxes", "bbox", "box", "score", "rating", "price", "评分", "分数", "得分", "价格", "json", "target", "output"),
)
QUESTIONS = {"question", "query", "prompt", "instruction", "问题", "提问", "指令"}
REPLIES = {"answer", "answers", "reply", "response", "output", "target", "答案", "回答", "回复"}
GROUPS = {"patient", "speaker", "subject", "customer", "user", "client", "病人", "患者", "说话人", "客户", "用户"}
BY_KIND: tuple[Kind, ...] = ("messages", "label", "labels", "boxes", "number", "json", "texts", "text")
FEWEST_GROUPS = 10  # of rows that are held out together
MOST_CHOICES = 20  # labels of which each is tried for every answer
FITTING: dict[str, tuple[Kind, ...]] = {  # kinds of answers of a task
    "answer": ("text", "label", "number"),
    "caption": ("text", "texts", "label"),
    "chat": ("messages",),
    "classify": ("label", "labels", "number"),
    "extract": ("json",),
    "ground": ("boxes",),
    "score": ("number",),
    "transcribe": ("text", "label"),
    "vqa": ("texts", "labels", "text", "label"),
}
STRICT = ("chat", "extract", "ground", "score")  # no other kinds can be read
TASKS = tuple(FITTING)
DEFAULT_MEDIA = {"transcribe": ("audio",)}  # of the tasks that ask about no pictures
NAMES = {"image": ("picture", "图片"), "audio": ("recording", "录音"), "video": ("video", "视频")}


@dataclass(frozen=True)
class Task:
    """A task as a recipe has it. `options`: without `prompt`. `unused`: columns that it doesn't read."""

    kind: str
    answer: Column
    media: tuple[str, ...]
    prompt: str
    options: Yaml
    head: str | Yaml = "language"
    columns: dict[str, str] = field(default_factory=dict)
    group: str | None = None
    unused: tuple[str, ...] = ()

    def written(self, prompt: str) -> Yaml:
        media: Yaml = {} if self.media == DEFAULT_MEDIA.get(self.kind, ("image",)) else {"media": [*self.media]}
        wording: Yaml = {"prompt": prompt} if self.kind != "chat" and prompt else {}
        return {"kind": self.kind, **media, **wording, **self.options}


def answers_in(columns: Sequence[Column], kind: str | None) -> list[Column]:
    """Columns that could be the answer, the likeliest first: those that fit the task of that kind, then by their names;
    of unknown names the last.
    """
    fitting = FITTING.get(kind or "", BY_KIND)

    asked = any(column.name.lower() in QUESTIONS for column in columns)

    def order(column: Column) -> tuple[int, int, int, int]:
        constant = column.kind in ("label", "text", "number") and len(column.texts) < 2
        name = column.name.lower()
        known = -1 if asked and name in REPLIES else ANSWERS.index(name) if name in ANSWERS else len(ANSWERS)
        unsure = (column.kind != "messages") + 2 * constant + 4 * (column.kind not in fitting)
        return unsure, known, BY_KIND.index(column.kind), -columns.index(column)

    fit = [column for column in columns if column.kind in BY_KIND and column.name.lower() not in QUESTIONS]
    return sorted(fit, key=order)


def task_for(columns: Sequence[Column], answer: Column, kind: str | None, text: str | None, language: str) -> Task:
    """The task whose answers are in a column. `kind`: the task, None: by the column's values; `text`: a column that is
    put before the question, None: the longest text of rows without media. Raises RecipeError.
    """
    if kind is not None and kind not in TASKS:
        raise RecipeError(f"--task {kind}: finetune init writes recipes for {', '.join(TASKS)}; see docs/parts.md")
    if kind in STRICT and answer.kind not in FITTING[kind]:
        held = f"column {answer.name!r} holds {answer.kind}, not {FITTING[kind][0]}"
        raise RecipeError(f"--task {kind}: {held}; name another with --answer")
    media = _media_of(columns, answer)
    asked = next((c for c in columns if c.name.lower() in QUESTIONS and c.kind != "empty" and c is not answer), None)
    kind = kind or _kind(answer, asked, tuple(media))
    if kind == "transcribe":
        media = {name: column for name, column in media.items() if name in ("audio", "video")}
    if text is not None and text not in {column.name for column in columns}:
        raise RecipeError(f"--text {text}: there is no such column; there are: {_names(columns)}")
    before = text or _text_before(columns, answer, asked, kind, bool(media)) or ""
    options = _options(kind, answer, asked.name if asked else "", before)
    if not media and not before and not asked and kind != "chat":
        raise RecipeError(
            f"nothing to ask about: no column holds pictures, recordings, videos or text beside {answer.name!r} "
            f"(columns: {_names(columns)})"
        )
    if kind == "transcribe" and not media:
        raise RecipeError(f"--task transcribe: no column holds recordings (columns: {_names(columns)})")
    used = {answer.name, before, asked.name if asked and kind in ("answer", "vqa") else "", *media.values()}
    return Task(
        kind,
        answer,
        tuple(media),
        _prompt(kind, answer.name, tuple(media), bool(asked), language == "zh"),
        options,
        _head(kind, answer),
        {name: column for name, column in media.items() if name != column},
        _group(columns, answer),
        tuple(c.name for c in columns if c.name not in used and c.kind != "empty"),
    )


def _media_of(columns: Sequence[Column], answer: Column) -> dict[str, str]:
    """{kind of media: the column that holds it, for at least half of the rows}; the kinds alone where the media are in
    the conversations.
    """
    if answer.kind == "messages":
        return {kind: kind for kind in answer.media}
    media: dict[str, str] = {}
    for column in columns:
        if (
            column.kind in NAMES
            and 2 * column.filled >= answer.filled
            and (column.kind not in media or column.name == column.kind)
        ):
            media[column.kind] = column.name
    return media


def _kind(answer: Column, asked: Column | None, media: tuple[str, ...]) -> str:
    several = answer.kind in ("labels", "texts") or bool(answer.separator)
    if answer.kind in ("messages", "json") or (answer.kind == "boxes" and "image" in media):
        return {"messages": "chat", "json": "extract", "boxes": "ground"}[answer.kind]
    if asked:
        return "vqa" if several and "image" in media else "answer"
    if answer.kind == "number":
        return "classify" if answer.name.lower() in LABEL_NAMES or len(answer.texts) <= 2 else "score"
    if answer.kind in ("label", "labels"):
        return "classify"
    if not media or answer.name.lower() in REPLIES:
        return "answer"
    return "transcribe" if media == ("audio",) else "caption"


def _text_before(
    columns: Sequence[Column], answer: Column, asked: Column | None, kind: str, with_media: bool
) -> str | None:
    """The column that is put before the question. A row with media gets none but the phrase that boxes locate: other
    columns may give the answer away.
    """
    texts = [c for c in columns if c.kind in ("text", "label") and c is not answer and c is not asked]
    if kind == "ground":
        return texts[0].name if texts else None
    if with_media or asked or not texts:
        return None
    return max(texts, key=lambda column: column.characters).name


def _options(kind: str, answer: Column, asked: str, before: str) -> Yaml:
    text: Yaml = {"text": before} if before else {}
    if kind == "classify":
        label = {} if answer.name == "label" else {"label": answer.name}
        return {**text, **label, **({"separator": answer.separator} if answer.separator else {})}
    if kind == "score":
        numbers = sorted(map(float, answer.texts))
        rating = len(numbers) <= 11 and all(number.is_integer() for number in numbers)
        bounds = {"minimum": numbers[0], "maximum": numbers[-1]} if rating and len(numbers) > 1 else {}
        return {**text, **({} if answer.name == "score" else {"number": answer.name}), **bounds}
    if kind == "ground":
        return {"text": before, **({} if answer.name == "boxes" else {"boxes": answer.name}), **_units(answer)}
    if kind == "answer":
        return {**text, **({} if asked == "question" else {"question": asked}), **_unless("answer", answer.name)}
    if kind == "vqa":
        separator = {} if answer.separator == ";" else {"separator": answer.separator}
        question = {} if asked == "question" else {"question": asked}
        return {**text, **question, **_unless("answers", answer.name), **separator}
    if kind == "extract":
        return {**text, "answer": answer.name}
    if kind == "transcribe":
        return _unless("text", answer.name)
    return {**text, **_unless("caption", answer.name)} if kind == "caption" else {}


def _unless(default: str, name: str) -> Yaml:
    return {} if name == default else {default: name}


def _units(answer: Column) -> Yaml:
    """Fractions where no number is above 1; a corner and a size where a right edge would be left of the left one."""
    boxes = []
    for text in answer.texts:
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
        boxes += [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    units: Yaml = {"units": "fractions"} if max(number for box in boxes for number in box) <= 1 else {}
    corners = all(box[0] < box[2] and box[1] < box[3] for box in boxes)
    return units | ({} if corners else {"order": "corner_and_size"})


def _head(kind: str, answer: Column) -> str | Yaml:
    """A number is read from a head of its own. Few labels are chosen by their probability, so that nothing else is ever
    answered; this needs no new weights, which suits few rows.
    """
    if kind == "score":
        return "score"
    if kind == "classify" and not answer.separator and len(answer.texts) <= MOST_CHOICES:
        return {"kind": "language", "answers": "labels"}
    return "language"


def _group(columns: Sequence[Column], answer: Column) -> str | None:
    for column in columns:
        groups = column.kind in ("label", "text", "id", "number") and len(column.texts) >= FEWEST_GROUPS
        complete = column.filled == answer.filled > len(column.texts)
        if column.name.lower() in GROUPS and groups and complete and column is not answer:
            return column.name
    return None


def _prompt(kind: str, answer: str, media: tuple[str, ...], asked: bool, chinese: bool) -> str:
    medium = NAMES[media[0]][chinese] if media else ("text", "文字")[chinese]
    wordings = {
        "classify": ("What is this?", "这是什么？"),
        "caption": (f"Describe the {medium}.", f"描述这{'段' if media != ('image',) else '张'}{medium}。"),
        "transcribe": ("Transcribe.", "写下录音的内容。"),
        "score": (f"Estimate the {answer}.", f"估计{answer}。"),
        "ground": ("Where is it? [x1, y1, x2, y2], 0 to 1000", "它在哪里？[x1, y1, x2, y2]，0 到 1000"),
        "extract": ("Fill this in as JSON.", "填写这个 JSON。"),
        "answer": ("" if asked else f"Write the {answer}.", "" if asked else f"写出{answer}。"),
    }
    if kind == "classify" and answer.lower() not in LABEL_NAMES:
        wordings["classify"] = (f"Which {answer}?", f"{answer}是什么？")
    return wordings.get(kind, ("", ""))[chinese]


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(repr(column.name) for column in columns)
