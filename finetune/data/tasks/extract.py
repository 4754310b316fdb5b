"""Extract the fields of a form, a receipt or an invoice as a JSON object."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from finetune.common.errors import DataError, MissingColumn
from finetune.data.formats import Columns
from finetune.data.metrics import means
from finetune.data.metrics.labels import precision_recall_f1
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks import Measure, Tables
from finetune.data.tasks._columns import DistillableOptions, number_of, question, texts_of, value_of

HEADS = ("language",)
PRIMARY = "field_f1"

MAX_DEPTH = 20  # of nested objects and lists
BOOLEANS = {"true": True, "yes": True, "1": True, "是": True, "false": False, "no": False, "0": False, "否": False}

Simple = Literal["text", "number", "boolean"] | tuple[str, ...]
Kind = Literal["text", "number", "boolean", "list"] | tuple[str, ...] | dict[str, Simple]
JsonObject: TypeAlias = dict[str, Any]


class Options(DistillableOptions):
    prompt: str = Field("Fill this in as JSON.", description="The question; the fields and their kinds follow it.")
    fields: dict[str, Kind] = Field(
        {},
        description="Field -> text, number, boolean, list (of texts), a list of allowed texts, or {field: kind} for a "
        "list of objects. Each may be null. {}: any fields.",
    )
    answer: str = Field("json", description="Column of the JSON object; '' if each field has a column of its name.")
    separator: str = Field(";", description="Separator of a list's texts in such a column.")

    @model_validator(mode="after")
    def _columns_are_known(self) -> Self:
        if not self.answer and not self.fields:
            raise ValueError("answer: '' needs `fields`, whose names are the columns.")
        return self


def sample(row: Row, options: Options) -> Sample:
    if options.answer:
        values = value_of(row, options.answer)
        if options.answer not in row.columns:
            raise MissingColumn(
                f"{row.where}: column {options.answer!r} is missing (columns: {', '.join(row.columns)[:200]}); name "
                "that of the JSON object with `answer: COLUMN`",
                options.answer,
            )
        if not isinstance(values, dict):
            raise DataError(
                f"{row.where}: {row.called(options.answer)} holds {str(values)[:60]!r}; write a JSON object"
            )
    else:
        values = {name: _cell(row, name, kind, options) for name, kind in options.fields.items()}
    if misfit := _misfit(values, options):
        raise DataError(f"{row.where}: {misfit}; see the task's `fields`")
    target = {name: values[name] for name in options.fields or values}
    fields = json.dumps(options.fields, ensure_ascii=False) if options.fields else ""
    prompt = "\n".join(part for part in (options.prompt, fields) if part)
    answer = json.dumps(target, ensure_ascii=False)
    if read(Answer(answer), options) != target:
        raise DataError(f"{row.where}: the answer isn't valid JSON: it holds NaN, or is deeper than {MAX_DEPTH} levels")
    turns = question(row, options, prompt=prompt), Message("assistant", (answer,))
    return Sample(turns, row.where, "extract", target=target)


def stand_in(row: Row, options: Options) -> Columns:
    empty = dict.fromkeys(options.fields)
    return {options.answer: empty} if options.answer else empty


def read(answer: Answer, options: Options) -> JsonObject | None:
    """The first JSON object in the text, in a ``` fence or not; None if there is none or it is nested too deeply."""
    decoder = json.JSONDecoder(parse_constant=_number, parse_float=_number)
    for start in (match.start() for match in re.finditer("{", answer.text)):
        with suppress(ValueError, RecursionError):
            value: JsonObject = decoder.raw_decode(answer.text, start)[0]
            return value if _is_shallow(value, MAX_DEPTH) else None
    return None


def measure(prediction: JsonObject | None, target: JsonObject, options: Options) -> Measure:
    """ "good": F1 of the row's fields."""
    predicted, right = Counter(_pairs(prediction or {})), Counter(_pairs(target))
    fields: dict[str, list[int]] = {}  # field -> hits, predicted values, right values
    for index, pairs in enumerate((predicted & right, predicted, right)):
        for (name, *_), count in pairs.items():
            fields.setdefault(name, [0, 0, 0])[index] += count
    hits, values = (predicted & right).total(), predicted.total() + right.total()
    good = float(prediction is not None) if not values else 2 * hits / values
    return {
        "good": good,
        "fields": fields,
        "json_valid": float(prediction is not None),
        "schema_valid": float(prediction is not None and not _misfit(prediction, options)),
        "exact_match": float(prediction is not None and _plain(prediction) == _plain(target)),
    }


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """json_valid, schema_valid (all `fields`, of their kinds, and no other) and exact_match: shares of rows. field_f1:
    F1 over the pairs of field and value of all rows, with the elements of lists counted one by one; null and '' are no
    values, and extra white space is ignored. Left out if there are no values.
    """
    scores = means(rows, ("json_valid", "schema_valid", "exact_match"))
    counts = [sum(count[index] for row in rows for count in row["fields"].values()) for index in range(3)]
    return scores | ({"field_f1": precision_recall_f1(*counts)[2]} if any(counts) else {})


def tables(rows: Sequence[Measure], options: Options) -> Tables:
    """Precision, recall, F1 and the number of right values of each field."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*options.fields, *(name for row in rows for name in row["fields"])]):
        counts = [sum(row["fields"].get(name, (0, 0, 0))[index] for row in rows) for index in range(3)]
        table[name] = dict(zip(("precision", "recall", "f1"), precision_recall_f1(*counts), strict=True))
        table[name]["support"] = counts[2]
    return {"per_label": table}


def _cell(row: Row, name: str, kind: Kind, options: Options) -> Any:
    """The value of a field from the column of its name; None if that is empty. Raises DataError."""
    if name not in row.columns:
        columns = ", ".join(row.columns)[:200]
        raise MissingColumn(f"{row.where}: column {name!r} is missing; the columns are: {columns}", name)
    value = value_of(row, name)
    if value is None or isinstance(kind, dict):
        return value
    if kind == "number":
        return int(number) if (number := number_of(row, name)).is_integer() else number
    if kind == "boolean":
        return BOOLEANS.get(row.text(name).casefold(), value)
    return texts_of(row, name, options.separator) if kind == "list" else row.text(name)


def _misfit(values: JsonObject, options: Options) -> str:
    """What doesn't fit the fields, like "field 'total' holds 'much', not number or null"; '' if all fits."""
    if not options.fields:
        return ""
    try:
        _model(json.dumps(options.fields)).model_validate(values)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        if name not in options.fields:
            return f"field {name!r} is none of {', '.join(options.fields)}"
        kind = json.dumps(options.fields[name], ensure_ascii=False).strip('"')
        problem = f"holds {str(values[name])[:60]!r}, not {kind} or null" if name in values else "is missing"
        return f"field {name!r} {problem}"
    return ""


@lru_cache(maxsize=64)
def _model(fields: str) -> type[BaseModel]:
    return _object({name: tuple(kind) if isinstance(kind, list) else kind for name, kind in json.loads(fields).items()})


def _object(fields: dict[str, Kind]) -> type[BaseModel]:
    types: dict[str, Any] = {"text": str, "number": int | float, "boolean": bool, "list": list[str]}
    members: dict[str, Any] = {}
    for number, (name, kind) in enumerate(fields.items()):
        if isinstance(kind, dict):
            annotation: Any = list[_object(kind)]  # type: ignore[misc, arg-type]
        else:
            annotation = types[kind] if isinstance(kind, str) else Literal[tuple(kind)]
        members[f"field_{number}"] = (annotation | None, Field(alias=name))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Fields", __config__=config, **members)


def _pairs(value: Any, *path: str) -> list[tuple[str, ...]]:
    """(field, ..., type, value) of each value, with the elements of lists one by one."""
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _pairs(inner, *path, name)]
    if isinstance(value, list):
        return [pair for inner in value for pair in _pairs(inner, *path, "[]")]
    plain = _plain(value)
    return [] if plain is None else [(*path, type(plain).__name__, str(plain))]


def _plain(value: Any) -> Any:
    """A value in the form in which values are compared: without null and '', 2.0 as 2, single spaces in texts."""
    if isinstance(value, dict):
        return {name: plain for name, inner in value.items() if (plain := _plain(inner)) is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return " ".join(value.split()) or None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_shallow(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a JSON number")
    return number
