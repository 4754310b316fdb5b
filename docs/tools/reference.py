"""Writes docs/recipe-reference.md: every key of a recipe and every option of its parts, from the schema itself.

python docs/tools/reference.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.common.registry import FOLDERS, part_names
from finetune.recipe.parts import kind_schema
from finetune.recipe.schema import outline

PAGE = Path(__file__).resolve().parents[1] / "recipe-reference.md"
BEGINNING = """# Key reference

<!-- Written by docs/tools/reference.py from the schema: change the descriptions there. -->

Every key of a recipe with its type, default and meaning, then the options of each part. In a terminal:
`finetune schema train` prints a section, `finetune schema projectors.mlp` a part, and `finetune schema` the JSON schema
of the whole, which gives editors completion and checks. A key without a default must be written. `N` stands for the
number of an entry, from 0, `NAME` for a name that you choose: `--set train.stages.1.epochs=3`.
"""
SINGULAR = {
    "encoders": "encoder",
    "projectors": "projector",
    "heads": "head",
    "tasks": "task",
    "formats": "format",
    "objectives": "objective",
}
PLURAL = {"section": "sections", "text": "texts", "integer": "integers", "path": "paths", "any": "anything"}
Schema = dict[str, Any]


def resolved(node: Schema, definitions: Schema) -> Schema:
    return definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def values_of(node: Schema) -> Schema | None:
    """The schema of a mapping's values."""
    candidates = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    return next((values for values in candidates if isinstance(values, dict)), None)


def section_in(node: Schema, definitions: Schema) -> tuple[str, Schema] | None:
    """What a key's value, or an entry of its list or mapping, is below: ('', '.N' or '.NAME') and the section."""
    for alternative in node.get("anyOf", [node]):
        suffix, inner = "", alternative
        if alternative.get("type") == "array":
            suffix, inner = ".N", alternative["items"]
        elif values := values_of(alternative):
            suffix, inner = ".NAME", values
        inner = resolved(inner, definitions)
        if "properties" in inner:
            return suffix, inner
    return None


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def bounds(node: Schema) -> str:
    lowest = node.get("minimum", node.get("exclusiveMinimum"))
    highest = node.get("maximum", node.get("exclusiveMaximum"))
    above, below = "exclusiveMinimum" in node, "exclusiveMaximum" in node
    parts = [f"{'>' if above else '≥'} {number(lowest)}"] if lowest is not None else []
    parts += [f"{'<' if below else '≤'} {number(highest)}"] if highest is not None else []
    return " " + ", ".join(parts) if parts else ""


def type_of(node: Schema, definitions: Schema) -> str:
    """In words, for a cell of a table."""
    if "part" in node:
        return f"[{SINGULAR.get(node['part'], node['part'])}](#{node['part']})"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(type_of(one, definitions) for one in node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    target = resolved(node, definitions)
    if "properties" in target:
        return "section"
    kind = target.get("type")
    if kind == "array":
        items = type_of(target.get("items", {}), definitions)
        return f"list of {PLURAL.get(items, items)}"
    if kind == "object":
        values = values_of(target)
        return f"name → {type_of(values, definitions)}" if values else "mapping"
    if kind in ("integer", "number"):
        return kind + bounds(target)
    words = {"string": "text", "boolean": "true or false", "null": "null", None: "any"}
    return "path" if target.get("format") == "path" else words[kind]


def default_of(name: str, owner: Schema, node: Schema, definitions: Schema) -> str:
    if name in owner.get("required", []):
        return ""
    value = node.get("default")
    if value == {} and section_in(node, definitions) and not values_of(node):
        return "those below"
    if isinstance(value, dict) and "kind" in value:
        value = value["kind"]
    return f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*.", "\\*.").replace(" -> ", " → ")


def table(owner: Schema, definitions: Schema) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, node in owner["properties"].items():
        if name == "kind" and "const" in node:
            continue
        kind, default = type_of(node, definitions), default_of(name, owner, node, definitions)
        yield f"| `{name}` | {kind} | {default} | {escaped(node.get('description', ''))} |"


def sections(prefix: str, owner: Schema, definitions: Schema) -> Iterator[str]:
    """The table of a section, then those below it."""
    yield from table(owner, definitions)
    for name, node in owner["properties"].items():
        if found := section_in(node, definitions):
            suffix, inner = found
            key = f"{prefix}{name}{suffix}"
            yield from ("", f"### `{key}`", "", escaped(node.get("description", "")), "")
            yield from sections(f"{key}.", inner, definitions)


def parts(folder: str) -> Iterator[str]:
    for name in part_names(folder):
        definitions: Schema = {}
        part = kind_schema(folder, name, definitions)
        short = {key.rpartition(".")[2]: value for key, value in definitions.items()}
        yield from ("", f"### `{folder}.{name}`", "", escaped(part["description"]).rstrip(":"), "")
        yield from table(part, short) if len(part["properties"]) > 1 else ["No options."]


def page() -> str:
    root = outline()
    lines = [BEGINNING, "## Recipe", "", *sections("", root, root["$defs"])]
    for folder in FOLDERS:
        lines += ["", f"## {folder.capitalize()}", *parts(folder)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
