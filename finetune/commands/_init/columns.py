"""Columns of rows, by their values: media, labels, numbers, boxes, conversations, text."""

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.formats import Columns, _media
from finetune.data.formats._media import MOST
from finetune.data.metrics.text import words
from finetune.data.tasks._columns import NUMBER, number_from, split_at

Kind = Literal[
    "image",
    "audio",
    "video",
    "messages",
    "json",
    "boxes",
    "texts",
    "number",
    "label",
    "labels",
    "text",
    "id",
    "date",
    "empty",
]
MEDIA = ("image", "audio", "video")
SEPARATORS = (";", "|")  # of several labels in a cell; ; stands for its full-width form too
SHORT = 60  # characters of a label, at most
RARE = 2  # rows of a label, of which hardly any is left to learn from or to score
MOST_LABELS = 200
NUMERIC = 0.95  # share of numbers in a column of them; what else is in it is reported row by row
HAN = re.compile("[\u3400-\u9fff]")
KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
LABEL_NAMES = frozenset(
    [
        "label",
        "labels",
        "class",
        "category",
        "kind",
        "type",
        "target",
        "tag",
        "tags",
        "标签",
        "类别",
        "分类",
        "类型",
        "种类",
    ]
)
IDENTIFIERS = {
    *("id", "uuid", "key", "no", "nr", "ticket", "invoice", "phone", "nummer", "telefon", "numéro", "número"),
    *("编号", "单号", "序号", "工号", "学号", "电话", "手机号"),
}
MONTHS = "jan|feb|mar|mär|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez"
DATE = re.compile(
    r"(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})|\d{4}年\d{1,2}月(?:\d{1,2}日)?"
    r"|(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
    rf"|\d{{1,2}}\.?[ -](?:{MONTHS})\w*\.?,?[ -]\d{{2,4}}|(?:{MONTHS})\w*\.? \d{{1,2}},? \d{{4}})"
    r"(?:[T ]+\d{1,2}:\d{2}.*)?|\d{1,2}:\d{2}(?::\d{2})?",
    re.IGNORECASE,
)
FOUR_NUMBERS = re.compile(rf"\s*{NUMBER}(?:\s*[,\s]\s*{NUMBER}){{3}}\s*")


@dataclass(frozen=True)
class Column:
    """`texts`: its different values, most frequent first; of `labels` the single labels. `rare`: of labels and numbers
    those that occur once or twice, rarest first, each with its count. `filled`: rows with a value.
    `separator`: of several labels or short texts in a cell. `media`: kinds of media in conversations, and the kind of a
    column of media.
    """

    name: str
    kind: Kind
    texts: tuple[str, ...]
    filled: int
    separator: str = ""
    media: tuple[str, ...] = ()
    rare: tuple[tuple[str, int], ...] = ()

    @property
    def characters(self) -> float:
        """Mean length of a value."""
        return sum(map(len, self.texts)) / max(len(self.texts), 1)


def describe_columns(rows: Sequence[Columns]) -> tuple[Column, ...]:
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(_column(str(name), [row.get(name) for row in rows]) for name in names)


def called(name: str, words: Container[str]) -> bool:
    """Whether a column's name, or a word in it, is one of `words`: of 'Ticket No', TicketNo and ticket_no the word no.
    Chinese words are found anywhere, since no spaces are between them.
    """
    parts = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-zß-ÿ])(?=[A-Z])", " ", name).lower())
    runs = [run for part in parts for run in re.findall("[\u3400-\u9fff]+", part)]
    pieces = [run[i:j] for run in runs for i in range(len(run)) for j in range(i + 2, len(run) + 1)]
    return any(part in words for part in (name.lower(), *parts, *pieces))


def file_names(values: Iterable[Any]) -> list[str]:
    """Paths and addresses among the values of a column of media, one or a list of them per row."""
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    names = [one.get("path") if isinstance(one, dict) and one.get("bytes") is None else one for one in flat]
    return [name for name in names if isinstance(name, str) and name and not name.startswith("data:")]


def language_of(texts: Iterable[str]) -> str:
    """zh where at least a fifth of the words are Chinese characters, en where nearly all letters are ASCII, else ''."""
    text = " ".join(texts)
    total = len(words(text))
    if not total:
        return "en"
    if KANA_OR_HANGUL.search(text):
        return ""
    if len(HAN.findall(text)) >= total / 5:
        return "zh"
    letters = [character for character in text if character.isalpha()]
    return "en" if sum(map(str.isascii, letters)) >= 0.98 * len(letters) else ""


def _column(name: str, cells: Sequence[Any]) -> Column:
    values = [cell for cell in cells if cell not in (None, "", []) and not (isinstance(cell, str) and cell.isspace())]
    if not values:
        return Column(name, "empty", (), 0)
    if medium := _medium_of(name, values):
        return Column(name, medium, (), len(values), media=(medium,))
    if all(isinstance(value, list) and value and isinstance(value[0], dict) for value in values):
        return _conversations(name, values)
    parsed = [_parsed(value) for value in values]
    if all(isinstance(value, dict) for value in parsed):
        return Column(name, "json", tuple(json.dumps(value, ensure_ascii=False) for value in parsed), len(values))
    if all(_is_boxes(value) for value in parsed):
        return Column(name, "boxes", tuple(str(value) for value in parsed), len(values))
    if all(isinstance(value, list) for value in parsed):
        return _texts(name, [[str(item) for item in value] for value in parsed])
    texts = [json.dumps(value) if isinstance(value, bool) else str(value).strip() for value in values]
    counts = Counter(texts)
    different = tuple(text for text, _ in counts.most_common())
    if all(map(DATE.fullmatch, texts)):
        return Column(name, "date", different, len(values))
    unique = len(different) >= MOST * len(texts) > 2
    numbers = Counter({text: count for text, count in counts.items() if number_from(text) is not None})
    if numbers.total() >= NUMERIC * len(texts):
        kind: Kind = "id" if unique and called(name, IDENTIFIERS) else "number"
        return Column(name, kind, tuple(text for text, _ in numbers.most_common()), len(values), rare=_rare(numbers))
    for separator in SEPARATORS:
        pieces = [split_at(text, separator) for text in texts]
        labels = Counter(piece for row in pieces for piece in row)
        if sum(len(row) > 1 for row in pieces) >= len(texts) / 10 and _are_labels(name, labels, len(texts)):
            return Column(name, "labels", tuple(labels), len(values), separator, rare=_rare(labels))
    if _are_labels(name, different, len(texts)):
        return Column(name, "label", different, len(values), rare=_rare(counts))
    identifiers = unique and all(re.fullmatch(r"[\w.-]*\d[\w.-]*", text, re.A) for text in texts)
    return Column(name, "id" if identifiers else "text", different, len(values), _separator_of(texts))


def _rare(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple((text, count) for text, count in reversed(counts.most_common()) if count <= RARE)


def _separator_of(texts: Sequence[str]) -> str:
    """Of texts that nearly all are several short ones, as people's answers to one question are; '' for others."""
    for separator in SEPARATORS:
        pieces = [split_at(text, separator) for text in texts]
        if sum(len(row) > 1 and max(map(len, row)) <= SHORT for row in pieces) >= MOST * len(texts):
            return separator
    return ""


def _medium_of(name: str, values: Sequence[Any]) -> Any:
    """The kind of media that a column holds, or None: by its name where a format or a user calls it so."""
    if name in MEDIA and not isinstance(values[0], int | float):
        return name
    return _media.kind_of_values(values)


def _conversations(name: str, values: Sequence[Any]) -> Column:
    parts = [message.get("content") for value in values for message in value if isinstance(message, dict)]
    flat = [part for content in parts for part in (content if isinstance(content, list) else [content])]
    kinds = {part.get("type") for part in flat if isinstance(part, dict)}
    texts = [part["text"] for part in flat if isinstance(part, dict) and isinstance(part.get("text"), str)]
    texts += [part for part in flat if isinstance(part, str)]
    media = tuple(kind for kind in MEDIA if kind in kinds)
    return Column(name, "messages", tuple(texts), len(values), media=media)


def _texts(name: str, lists: Sequence[Sequence[str]]) -> Column:
    """A column of lists: of labels if there are few different ones, else of texts."""
    counts = Counter(text for texts in lists for text in texts)
    kind: Kind = "labels" if _are_labels(name, counts, len(lists)) else "texts"
    return Column(name, kind, tuple(text for text, _ in counts.most_common()), len(lists), ";", rare=_rare(counts))


def _are_labels(name: str, different: Iterable[str], rows: int) -> bool:
    """Whether there are so few different values, and such short ones, that each is learned from several rows."""
    texts = tuple(different)
    if len(texts) >= rows and name.lower() not in LABEL_NAMES:
        return False
    several = max(rows / 4, min(rows / 2, 10)) if name.lower() not in LABEL_NAMES else rows / 2
    return len(texts) <= max(min(several, MOST_LABELS), 2) and max(map(len, texts), default=0) <= SHORT


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _is_boxes(value: Any) -> bool:
    if isinstance(value, str):
        return bool(FOUR_NUMBERS.fullmatch(value))
    if not isinstance(value, list):
        return False
    boxes = value if value and isinstance(value[0], list) else [value]
    return all(isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) for n in box) for box in boxes)
