"""Read the fields of a form, a receipt or an invoice off it, as a JSON object."""

import json
import math
import re
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.labels import precision_recall_f1
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask, number_of, text_of, texts_of, transcript_of, value_of

HEADS = ("language",)
PRIMARY = "field_f1"

DEPTH = 20  # of objects and lists in each other
TRUTHS = {"true": True, "yes": True, "1": True, "是": True, "false": False, "no": False, "0": False, "否": False}

Simple = Literal["text", "number", "boolean"] | tuple[str, ...]
Kind = Literal["text", "number", "boolean", "list"] | tuple[str, ...] | dict[str, Simple]


class Options(PartOptions):
    prompt: str = Field("Fill this in as JSON.", description="The question, put before the fields and their kinds.")
    media: tuple[str, ...] = Field(
        ("image",), description="Kinds of media, each in the column of its name; [] for none."
    )
    text: str = Field("", description="Column of text put before the question; '' for none.")
    fields: dict[str, Kind] = Field(
        {},
        description="Field -> text, number, boolean, list (of texts), the texts that it may hold, or {field: kind} for "
        "a list of objects. Each may be null. {}: whatever the rows hold.",
    )
    answer: str = Field("json", description="Column of the JSON object; '' where each field has a column of its name.")
    separator: str = Field(";", description="What stands between a list's texts in such a column.")
    transcript: str = Field("", description="Column that says in words what the media show or say, for distill.")

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        if not self.answer and not self.fields:
            raise ValueError("answer: '' needs `fields`, whose names are the columns.")
        return self


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    if options.answer:
        found = value_of(row, options.answer)
        if not isinstance(found, dict):
            seen = f"holds {str(found)[:60]!r}" if options.answer in row.columns else "is missing"
            raise DataError(f"{row.where}: column {options.answer!r} {seen}; write a JSON object")
    else:
        found = {name: _cell(row, name, kind, options) for name, kind in options.fields.items()}
    if wrong := _misfit(found, options):
        raise DataError(f"{row.where}: {wrong}; see the task's `fields`")
    ordered = {name: found[name] for name in options.fields or found}
    fields = json.dumps(options.fields, ensure_ascii=False) if options.fields else ""
    prompt = "\n".join(part for part in (options.prompt, fields) if part)
    question = ask(row, prompt, options.media, (options.text,), transcript_of(row, options.transcript))
    answer = json.dumps(ordered, ensure_ascii=False)
    if read(Answer(answer), options) != ordered:
        raise DataError(f"{row.where}: what is to be answered isn't JSON for everyone (NaN, or deeper than {DEPTH})")
    return Sample((question, Message("assistant", (answer,))), row.where, "extract", target=ordered)


def read(answer: Answer, options: Options) -> dict[str, Any] | None:
    """The first JSON object in the text, in a ``` fence or not. None where there is none, or one too deep."""
    decoder = json.JSONDecoder(parse_constant=_number, parse_float=_number)
    for start in (match.start() for match in re.finditer("{", answer.text)):
        with suppress(ValueError, RecursionError):
            found: dict[str, Any] = decoder.raw_decode(answer.text, start)[0]
            return found if _shallow(found, DEPTH) else None
    return None


def measure(prediction: dict[str, Any] | None, target: dict[str, Any], options: Options) -> dict[str, Any]:
    """ "good": F1 of the row's fields."""
    said, right = Counter(_pairs(prediction or {})), Counter(_pairs(target))
    fields: dict[str, list[int]] = {}
    for place, pairs in enumerate((said & right, said, right)):
        for (name, *_), times in pairs.items():
            fields.setdefault(name, [0, 0, 0])[place] += times
    hits, boxes = (said & right).total(), said.total() + right.total()
    good = float(prediction is not None) if not boxes else 2 * hits / boxes
    return {
        "good": good,
        "fields": fields,
        "json_valid": float(prediction is not None),
        "schema_valid": float(prediction is not None and not _misfit(prediction, options)),
        "exact_match": float(prediction is not None and _plain(prediction) == _plain(target)),
    }


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """json_valid, schema_valid (all `fields`, of their kinds, and no other) and exact_match: shares of rows. field_f1:
    of all rows' pairs of field and value, elements of lists one by one; null and '' are no value, and spaces around
    and between words don't count. Left out where there are no values.
    """
    scores = means(rows, ("json_valid", "schema_valid", "exact_match"))
    counts = [sum(count[place] for row in rows for count in row["fields"].values()) for place in range(3)]
    return scores | ({"field_f1": precision_recall_f1(*counts)[2]} if any(counts) else {})


def tables(rows: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Precision, recall, F1 and the number of right values of each field."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*options.fields, *(name for row in rows for name in row["fields"])]):
        counts = [sum(row["fields"].get(name, (0, 0, 0))[place] for row in rows) for place in range(3)]
        table[name] = dict(zip(("precision", "recall", "f1"), precision_recall_f1(*counts), strict=True))
        table[name]["support"] = counts[2]
    return {"per_label": table}


def _cell(row: Row, name: str, kind: Kind, options: Options) -> Any:
    """A field's value out of its own column; None where that is empty. Raises DataError."""
    if name not in row.columns:
        raise DataError(f"{row.where}: column {name!r} is missing; the columns are: {', '.join(row.columns)[:200]}")
    value = value_of(row, name)
    if value is None or isinstance(kind, dict):
        return value
    if kind == "number":
        return int(number) if (number := number_of(row, name)).is_integer() else number
    if kind == "boolean":
        return TRUTHS.get(text_of(row, name).casefold(), value)
    return texts_of(row, name, options.separator) if kind == "list" else text_of(row, name)


def _misfit(found: dict[str, Any], options: Options) -> str:
    """What doesn't fit the fields: "field 'total' holds 'much', not number or null"; '' where all does."""
    if not options.fields:
        return ""
    try:
        _model(json.dumps(options.fields)).model_validate(found)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        if name not in options.fields:
            return f"field {name!r} is none of {', '.join(options.fields)}"
        kind = json.dumps(options.fields[name], ensure_ascii=False).strip('"')
        seen = f"holds {str(found[name])[:60]!r}, not {kind} or null" if name in found else "is missing"
        return f"field {name!r} {seen}"
    return ""


@lru_cache(maxsize=64)
def _model(fields: str) -> type[BaseModel]:
    return _object({name: tuple(kind) if isinstance(kind, list) else kind for name, kind in json.loads(fields).items()})


def _object(fields: dict[str, Any]) -> type[BaseModel]:
    kinds: dict[str, Any] = {"text": str, "number": int | float, "boolean": bool, "list": list[str]}
    members: dict[str, Any] = {}
    for number, (name, kind) in enumerate(fields.items()):
        if isinstance(kind, dict):
            its: Any = list[_object(kind)]  # type: ignore[misc]
        else:
            its = kinds[kind] if isinstance(kind, str) else Literal[tuple(kind)]
        members[f"field_{number}"] = (its | None, Field(alias=name))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Fields", __config__=config, **members)


def _pairs(value: Any, *path: str) -> list[tuple[str, ...]]:
    """(field, ..., kind, value) of each value there is, elements of lists one by one."""
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _pairs(inner, *path, name)]
    if isinstance(value, list):
        return [pair for inner in value for pair in _pairs(inner, *path, "[]")]
    plain = _plain(value)
    return [] if plain is None else [(*path, type(plain).__name__, str(plain))]


def _plain(value: Any) -> Any:
    """What values are compared by: no nulls or '', 2.0 as 2, single spaces in texts."""
    if isinstance(value, dict):
        return {name: plain for name, inner in value.items() if (plain := _plain(inner)) is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return " ".join(value.split()) or None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shallow(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_shallow(one, depth - 1) for one in inner)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number
