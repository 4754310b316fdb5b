"""Errors of validation as messages that name file, line, key and what to write; and the option `--set`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails, core_schema

from finetune.common.errors import RecipeError, option
from finetune.common.registry import nearest, part_names
from finetune.recipe.parts import JsonSchema, kind_schema
from finetune.recipe.words import MAX_DEPTH, Location, Problem, describe, dotted, shorten
from finetune.recipe.yaml_reader import Document, Place, read_yaml

MAX_PROBLEMS = 10  # shown at once
EXPLAINED = 100  # the first in the file; each takes milliseconds
BOOLEAN_WORDS = dict.fromkeys(("yes", "on", "y", "true"), "true") | dict.fromkeys(("no", "off", "n", "false"), "false")
BUILT_IN_ERRORS = frozenset(get_args(core_schema.ErrorType)) - {"value_error", "assertion_error"} | {"path_type"}


def recipe_error(document: Document, problems: Iterable[Problem]) -> RecipeError:
    """One line per problem, in the order of the file."""
    lines = []
    for location, message in sorted(problems, key=lambda problem: document.place(problem.location).line):
        place, key = document.place(location).text, dotted(location)
        lines.append(f"{place}: {message}" if place == set_text(key) or not key else f"{place}: {key}: {message}")
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"... and {len(lines) - MAX_PROBLEMS} more."]
    return RecipeError("\n".join(lines))


def set_text(key: str) -> str:
    """How messages name a key that isn't in a file: an override, or a change made in Python."""
    return option(f"--set {key}", key)


def override(document: Document, assignment: str, schema: JsonSchema) -> None:
    """Apply one `full.dotted.key=value`, its value written as YAML."""
    key, equals, written = assignment.partition("=")
    text = set_text(shorten(key, 80))
    if not equals:
        near = nearest_key(key, document, schema) or shorten(key)
        raise RecipeError(f"{text}: no '='; write {set_text(near)}=VALUE.")
    set_key(document, key, read_yaml(written, text, numbered=False).value)


def set_key(document: Document, key: str, value: Any) -> None:
    """Set a full dotted key. One that doesn't exist is reported when the document is validated."""
    place = Place(0, set_text(shorten(key, 80)))
    steps = key.split(".")
    if len(steps) > MAX_DEPTH:
        raise RecipeError(f"{place.text}: no key is nested deeper than {MAX_DEPTH} levels.")
    location: Location = ()
    parent = document.value
    for depth, name in enumerate(steps, 1):
        step: Any = name
        if isinstance(parent, list):
            if name not in map(str, range(len(parent))):
                count = f"{len(parent)} {'entry' if len(parent) == 1 else 'entries'}, counted from 0"
                raise RecipeError(f"{place.text}: {dotted(location)} has {count}; there is no {shorten(name)!r}.")
            step = int(name)
        location = (*location, step)
        inner = child(parent, step)
        if depth == len(steps):
            parent[step] = value
        elif inner is None or isinstance(inner, str):  # short for a part: `task: caption` is `task: {kind: caption}`
            parent[step] = {} if inner is None else {"kind": inner}
            document.places[location] = place
        elif not isinstance(inner, dict | list):
            raise RecipeError(f"{place.text}: {dotted(location)} is {describe(inner)}; it has no keys.")
        parent = parent[step]
    for old in [old for old in document.places if old[: len(location)] == location]:
        del document.places[old]
    document.places[location] = place


def has(value: Any, step: str | int) -> bool:
    return step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))


def child(value: Any, step: str | int) -> Any:
    return value[step] if has(value, step) else None


def alternatives(node: JsonSchema, schema: JsonSchema) -> Iterator[JsonSchema]:
    """The schemas of which a value must match one, with references resolved."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    choices = node.get("anyOf") or node.get("oneOf")
    if not choices:
        yield node
    for choice in choices or ():
        yield from alternatives(choice, schema)


def members(node: JsonSchema, value: Any, schema: JsonSchema) -> dict[str | int, JsonSchema]:
    """The keys or indices that `value` has or may have, with their schemas; of a part, those of its kind."""
    schemas: dict[str | int, JsonSchema] = {}
    kind = value.get("kind") if isinstance(value, dict) else value
    for choice in alternatives(node, schema):
        if "part" in choice:
            if kind not in part_names(choice["part"]):
                continue
            choice = kind_schema(choice["part"], kind, schema["$defs"])
        properties = choice.get("properties", {})
        schemas |= properties
        for others in (choice.get("additionalProperties"), *choice.get("patternProperties", {}).values()):
            if isinstance(others, dict) and isinstance(value, dict):
                schemas |= {key: others for key in value if key not in schemas}
        if isinstance(value, list) and "items" in choice:
            schemas |= dict(enumerate([choice["items"]] * len(value)))
    return schemas


def at(location: Location, value: Any, schema: JsonSchema) -> tuple[JsonSchema, Any]:
    """The schema and the value at a location of the document `value`."""
    node = schema
    for step in location:
        node, value = members(node, value, schema).get(step, {}), child(value, step)
    return node, value


def dotted_keys(node: JsonSchema, value: Any, schema: JsonSchema, location: Location = ()) -> Iterator[str]:
    for step, inner in members(node, value, schema).items():
        here = (*location, step)
        yield dotted(here)
        if len(here) < MAX_DEPTH:
            yield from dotted_keys(inner, child(value, step), schema, here)


def nearest_key(key: str, document: Document, schema: JsonSchema) -> str | None:
    """The full dotted key that ends in `key`, or else the one with the most similar spelling."""
    keys = list(dotted_keys(schema, document.value, schema))
    return next((full for full in keys if full.endswith(f".{key}")), None) or nearest(key, keys)


def expected(node: JsonSchema, schema: JsonSchema) -> str:
    """What to write: "an integer from 1 to 1024", "one of nf4, int8, none"."""
    return " or ".join(dict.fromkeys(_expected_type(choice) for choice in alternatives(node, schema)))


def _expected_type(node: JsonSchema) -> str:
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    match node.get("type"):
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _bounds(node)
        case "string" if node.get("format") == "path":
            return "a path"
        case "string" if "pattern" in node:
            return f"text of the form {node['pattern']}"
        case "string":
            return "text that isn't empty" if "minLength" in node else "text"
        case "array":
            return "a list" + (f" of {node['minItems']} or more" if "minItems" in node else "")
        case kind:
            return {"boolean": "true or false", "null": "null", "object": "a mapping"}.get(str(kind), "another value")


def _bounds(node: JsonSchema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    limits = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    return " and".join(f" {words} {node[limit]}" for limit, words in limits.items() if limit in node)


def explain(document: Document, errors: Sequence[ErrorDetails], schema: JsonSchema) -> list[Problem]:
    """Pydantic's errors as locations in the document and short messages."""
    located = [(_written_location(error, document.value), error) for error in errors]
    located.sort(key=lambda entry: document.place(entry[0]).line)
    problems: dict[Location, str] = {}
    above = {location[:depth] for location, _ in located for depth in range(len(location))}
    misspelled: set[Location] = set()  # keys that aren't missing: another spelling of them is reported
    for location, error in sorted(located[:EXPLAINED], key=lambda entry: entry[1]["type"] == "missing"):
        # Of the branches of a union, only the one that got furthest is reported.
        if location in above:
            continue
        if error["type"] == "extra_forbidden":
            keys = [str(key) for key in members(*at(location[:-1], document.value, schema), schema)]
            near = nearest(str(location[-1]), keys)
            misspelled.add((*location[:-1], near or ""))
            place = document.place(location)
            if place.line == 0 and place != document.places[()]:  # written as one dotted key
                near = nearest_key(place.text.removeprefix(set_text("")), document, schema) or near
            near = near or nearest_key(str(location[-1]), document, schema)
            advice = f"Did you mean {near!r}?" if near else f"Keys here: {shorten(', '.join(keys), 150)}."
            problems[location] = f"unknown key. {advice}"
        elif error["type"] != "missing":
            problems[location] = _wrong_value(error, *at(location, document.value, schema), schema)
        elif location not in misspelled:
            description = at(location, document.value, schema)[0].get("description", "it is required")
            problems[location] = f"missing: {shorten(description.rstrip('.'), 150)}."
    for location, _ in located[EXPLAINED:]:
        if location not in above:
            problems.setdefault(location, "can't be used.")
    return [Problem(location, message) for location, message in problems.items()]


def _written_location(error: ErrorDetails, value: Any) -> Location:
    """Where an error is in the document: pydantic's location without the names of union branches."""
    location: Location = ()
    for number, step in enumerate(error["loc"], 1):
        if has(value, step) or (number == len(error["loc"]) and error["type"] == "missing"):
            location = (*location, step)
            value = child(value, step)
    return location


def _wrong_value(error: ErrorDetails, node: JsonSchema, value: object, schema: JsonSchema) -> str:
    if error["type"] not in BUILT_IN_ERRORS:
        return shorten(error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "), 240)
    if error["loc"][-1:] == ("[key]",):
        return f"a name here has the form {error.get('ctx', {}).get('pattern')}."
    wanted = expected(node, schema)
    if isinstance(value, str) and wanted == "true or false":
        wanted = BOOLEAN_WORDS.get(value.lower(), wanted)
    if type(value) in (int, float) and wanted.startswith("text"):
        wanted += f"; a number is text in quotes: '{value}'"
    return f"got {describe(value)}; write {wanted}."
