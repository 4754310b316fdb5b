"""Recipes, commands and Python in documents: read by the schema, by the command line's parser, and by Python."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import typer.main
import yaml
from documents import DOCUMENTS, HISTORY, ROOT, code_of, fences_of, relative

import finetune
from finetune.commands.cli import app
from finetune.recipe.load import load_recipe

PRESENT = [path for path in DOCUMENTS if path.name not in HISTORY]
every = pytest.mark.parametrize("document", PRESENT, ids=relative)
ENCODERS = {"image": "vision", "audio": "whisper", "video": "video"}
PROGRAM = re.compile(r"^(?:[\w./-]*/)?finetune +(?!/)(.*)$")
IN_COLUMNS = re.compile(r"(?:^|\s)(?:data: +\[(.*)\]|- (\{path: .*\}))$", flags=re.MULTILINE)


def full_recipe(fragment: dict[str, Any]) -> dict[str, Any]:
    """A recipe around the sections of a fragment."""
    weighted = re.search(r"'head': (?:'|\{'kind': ')(?:label|score)", str(fragment))
    own = [] if "base" in fragment.get("model", {}) else ["projectors"]  # a base's are rarely trained
    trains = [*own, "adapter", *(["heads"] if weighted else [])]
    base = {
        "name": "whole",
        "model": {
            "llm": {"name": "some/llm"},
            "encoders": {medium: {"kind": kind, "name": "some/encoder"} for medium, kind in ENCODERS.items()},
            "projectors": {medium: {"kind": "linear"} for medium in ENCODERS},
        },
        "data": [{"path": "rows.csv", "task": "caption"}],
        "train": {"stages": [{"name": "tune", "trains": trains, "learning_rate": 1e-3}]},
    }
    recipe = base | fragment
    for name in ("model", "train"):
        given = fragment.get(name, {})
        recipe[name] = given if "base" in given else base[name] | given
    if not any(source.get("split") == "test" or "hold_out" in source for source in recipe["data"]):
        recipe["data"] = [*recipe["data"], {"path": "held-out.csv", "task": "caption", "split": "test"}]
    return recipe


def read(recipe: dict[str, Any], folder: Path) -> None:
    for source in recipe["data"]:
        (folder / source["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / source["path"]).touch()
        if "media_folder" in source:
            (folder / source["media_folder"]).mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    load_recipe(folder / "recipe.yaml")


def recipes_in(document: Path) -> list[dict[str, Any]]:
    blocks = [yaml.safe_load(block) for block in fences_of(document, "yaml")]
    in_columns = (match for block in fences_of(document, "") for match in IN_COLUMNS.findall(block))
    return [*blocks, *({"data": yaml.safe_load(f"[{several or one}]")} for several, one in in_columns)]


@every
def test_recipes_are_read_by_the_schema(document, tmp_path):
    for number, recipe in enumerate(recipes_in(document)):
        (tmp_path / str(number)).mkdir()
        read(recipe if "name" in recipe else full_recipe(recipe), tmp_path / str(number))


def test_recipes_and_commands_are_found_in_documents():
    assert len(recipes_in(ROOT / "docs" / "data.md")) >= 10
    assert all(len(recipes_in(ROOT / f"README{suffix}.md")) == 1 for suffix in ("", ".zh"))
    assert len(command_lines(ROOT / "README.md")) == 8


def test_the_recipe_of_the_readme_is_short():
    for suffix in ("", ".zh"):
        (block,) = fences_of(ROOT / f"README{suffix}.md", "yaml")
        assert len(block.splitlines()) <= 15


def command_lines(document: Path) -> list[str]:
    lines = (line for block in fences_of(document, "", "bash", "console") for line in block.splitlines())
    return [match[1] for line in lines if (match := PROGRAM.match(line.removeprefix("$ ")))]


@every
def test_commands_are_parsed(document):
    for line in command_lines(document):
        words = shlex.split(line, comments=True)
        if "COMMAND" in words:
            continue
        command: click.Command = typer.main.get_command(app)
        context = click.Context(command, info_name="finetune")
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, line
            command, context = command.commands[words[0]], click.Context(command, parent=context)
            words = words[1:]
        try:
            command.make_context(line.split()[0], [word for word in words if word != "..."], parent=context)
        except Exception as error:
            pytest.fail(f"finetune {line}: {error}")


def python_of(document: Path) -> list[str]:
    calls = [code for code in code_of(document) if re.match(r"finetune\.\w+\(", code)]
    return [*fences_of(document, "python"), *calls]


@every
def test_python_compiles_and_its_imports_resolve(document):
    for code in python_of(document):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "finetune":
                assert node.attr in finetune.__all__ or node.attr == "model", f"finetune.{node.attr}"


@every
def test_json_is_json(document):
    for block in fences_of(document, "json"):
        json.loads(block)


def test_the_projector_of_the_documents_works():
    (code,) = fences_of(ROOT / "docs" / "extending.md", "python")
    part = ModuleType("documented")
    exec(compile(code, "extending.md", "exec"), part.__dict__)
    options = part.Options(hidden=8)
    assert part.build(4, 6, options)(torch.ones(2, 5, 4)).shape == (2, part.length(5, options), 6)
