"""Pydantic's errors as messages that name file, line, key and what to write."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails, core_schema

from finetune.common.errors import RecipeError
from finetune.recipe.words import MAX_DEPTH, Location, Problem, below, dotted, nearest, seen, shorten
from finetune.recipe.yaml_reader import Document, Place, read_yaml

BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "true": "true"} | dict.fromkeys(
    ("no", "off", "n", "false"), "false"
)


BUILT_IN_ERRORS = frozenset(get_args(core_schema.ErrorType)) - {"value_error", "assertion_error"} | {"path_type"}


def override(document: Document, assignment: str, schema: dict[str, Any]) -> None:
    """Apply one `--set full.dotted.key=value` to a document; keys that don't exist are found when it is validated."""
    key, equals, written = assignment.partition("=")
    name = f"--set {shorten(key, 80)}"
    if not equals:
        raise RecipeError(f"{name}: no '='; write --set {nearest_key(key, document, schema) or shorten(key)}=VALUE.")
    place = Place(0, name)
    value = read_yaml(written, name, numbered=False).value
    location: Location = ()
    parent = document.value
    steps = key.split(".")
    if len(steps) > MAX_DEPTH:
        raise RecipeError(f"{name}: no key is nested deeper than {MAX_DEPTH} levels.")
    for remaining, step in zip(reversed(range(len(steps))), steps, strict=True):
        index: Any = step
        if isinstance(parent, list):
            if step not in [str(number) for number in range(len(parent))]:
                count = f"{len(parent)} {'entry' if len(parent) == 1 else 'entries'}, counted from 0"
                raise RecipeError(f"{name}: {dotted(location)} has {count}; there is no {shorten(step)!r}.")
            index = int(step)
        location = (*location, index)
        if not remaining:
            parent[index] = value
            break
        inner = below(parent, index)
        if inner is None or isinstance(inner, str):  # a part written short: `task: caption` is `task: {kind: caption}`
            parent[index] = {} if inner is None else {"kind": inner}
            document.places[location] = place
        elif not isinstance(inner, dict | list):
            raise RecipeError(f"{name}: {dotted(location)} is {seen(inner)}, with no keys in it.")
        parent = parent[index]
    for old in [old for old in document.places if old[: len(location)] == location]:
        del document.places[old]
    document.places[location] = place


def alternatives(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of which a value must match one, references followed."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    choices = node.get("anyOf") or node.get("oneOf")
    if not choices:
        yield node
    for choice in choices or ():
        yield from alternatives(choice, schema)


def members(node: dict[str, Any], value: Any, schema: dict[str, Any]) -> dict[str | int, dict[str, Any]]:
    """The keys or indices that `value` has or may have, with their schemas; of a part, those of its kind."""
    found: dict[str | int, dict[str, Any]] = {}
    kind = value.get("kind") if isinstance(value, dict) else value
    for choice in alternatives(node, schema):
        properties = choice.get("properties", {})
        if properties.get("kind", {}).get("const", kind) != kind:
            continue
        found |= properties
        for others in (choice.get("additionalProperties"), *choice.get("patternProperties", {}).values()):
            if isinstance(others, dict) and isinstance(value, dict):
                found |= {key: others for key in value if key not in found}
        if isinstance(value, list) and "items" in choice:
            found |= dict.fromkeys(range(len(value)), choice["items"])
    return found


def node_at(location: Location, value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    node = schema
    for step in location:
        node = members(node, value, schema).get(step, {})
        value = below(value, step)
    return node


def dotted_keys(node: dict[str, Any], value: Any, schema: dict[str, Any], location: Location = ()) -> Iterator[str]:
    for step, inner in members(node, value, schema).items():
        here = (*location, step)
        yield dotted(here)
        if len(here) < MAX_DEPTH:
            yield from dotted_keys(inner, below(value, step), schema, here)


def nearest_key(key: str, document: Document, schema: dict[str, Any]) -> str | None:
    keys = list(dotted_keys(schema, document.value, schema))
    inside = [other for other in keys if other.endswith(f".{key}")]
    return inside[0] if inside else nearest(key, keys)


def expected(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """What to write: "an integer from 1 to 1024", "one of nf4, int8, none"."""
    phrases = []
    for choice in alternatives(node, schema):
        kind = choice.get("type")
        if "const" in choice:
            phrase = str(choice["const"])
        elif "enum" in choice:
            phrase = "one of " + ", ".join(map(str, choice["enum"]))
        elif kind in ("integer", "number"):
            phrase = ("an integer" if kind == "integer" else "a number") + bounds(choice)
        elif kind == "string":
            form = " that isn't empty" if "minLength" in choice else ""
            form = f" of the form {choice['pattern']}" if "pattern" in choice else form
            phrase = "a path" if choice.get("format") == "path" else f"text{form}"
        elif kind == "array":
            phrase = "a list" + (f" of {choice['minItems']} or more" if "minItems" in choice else "")
        else:
            phrase = {"boolean": "true or false", "null": "null", "object": "a mapping"}.get(str(kind), "another value")
        phrases.append(phrase)
    return " or ".join(dict.fromkeys(phrases))


def bounds(node: dict[str, Any]) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, under = node.get("maximum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    lower = f" of at least {low}" if low is not None else f" above {above}" if above is not None else ""
    upper = f" of at most {high}" if high is not None else f" below {under}" if under is not None else ""
    return f"{lower} and{upper}" if lower and upper else lower + upper


def explain(document: Document, errors: Sequence[ErrorDetails], schema: dict[str, Any]) -> list[Problem]:
    """Pydantic's errors as locations in the document and short messages."""
    located = [(_written_location(error, document.value), error) for error in errors]
    problems: dict[Location, str] = {}
    meant: set[Location] = set()
    for location, error in sorted(located, key=lambda entry: entry[1]["type"] == "missing"):
        # One branch of a union may have got further than the other; only that one is told.
        if any(other[: len(location)] == location != other for other, _ in located):
            continue
        value: Any = document.value
        for step in location[:-1]:
            value = below(value, step)
        parent = node_at(location[:-1], document.value, schema)
        if error["type"] == "extra_forbidden":
            keys = [str(key) for key in members(parent, value, schema)]
            near = nearest(str(location[-1]), keys)
            meant.add((*location[:-1], near or ""))
            place = document.place(location).text
            if place.startswith("--set "):
                near = nearest_key(place.removeprefix("--set "), document, schema) or near
            near = near or nearest_key(str(location[-1]), document, schema)
            advice = f"Did you mean {near!r}?" if near else f"Keys here: {shorten(', '.join(keys), 150)}."
            problems[location] = f"unknown key. {advice}"
        elif error["type"] == "missing":
            about = node_at(location, document.value, schema).get("description", "it is needed")
            if location not in meant:
                problems[location] = f"missing: {shorten(about.rstrip('.'), 150)}."
        else:
            problems[location] = _wrong_value(error, location, document.value, schema)
    return list(problems.items())


def _written_location(error: ErrorDetails, value: Any) -> Location:
    """Where an error is in the document: pydantic's location without the names of union branches."""
    location: Location = ()
    for number, step in enumerate(error["loc"], 1):
        known = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
        if known or (number == len(error["loc"]) and error["type"] == "missing"):
            location = (*location, step)
            value = below(value, step)
    return location


def _wrong_value(error: ErrorDetails, location: Location, document: Any, schema: dict[str, Any]) -> str:
    if error["type"] not in BUILT_IN_ERRORS:
        return shorten(error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "), 240)
    if error["loc"][-1:] == ("[key]",):
        return f"a name here has the form {error.get('ctx', {}).get('pattern')}."
    value = document
    for step in location:
        value = below(value, step)
    wanted = expected(node_at(location, document, schema), schema)
    if isinstance(value, str) and wanted == "true or false":
        wanted = BOOLEAN_WORDS.get(value.lower(), wanted)
    return f"got {seen(value)}; write {wanted}."
