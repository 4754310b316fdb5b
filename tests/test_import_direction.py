"""Imports go one way, without circles; imports inside functions and for type checkers count too."""

import subprocess
import sys

import pytest
from imports import MODULES, PACKAGE, imports_of

from finetune.common.registry import FOLDERS, part_names

ORDER = "common < recipe < data < model < evaluation export serving < training merging publishing < commands"
LEVELS = {folder: level for level, folders in enumerate(ORDER.split(" < ")) for folder in folders.split()}


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_the_package_is_these_folders():
    folders = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")}
    assert folders - {"__init__.py", "py.typed"} == set(LEVELS)


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_a_folder_imports_only_folders_below_it(name):
    upward = {
        f"{module} -> {other or 'finetune'}"
        for module in MODULES
        if folder(module) == name
        for other in imports_of(module)
        if other == "" or (folder(other) != name and LEVELS[folder(other)] >= LEVELS[name])
    }
    assert not upward


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports_of(name) for name in MODULES if name}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_parts_do_not_import_each_other(folder):
    siblings = {name for name in MODULES if name.startswith(f"{folder}.") and name.count(".") == folder.count(".") + 1}
    parts = {name for name in siblings if not name.rpartition(".")[2].startswith("_")}
    assert parts
    for name in parts:
        assert not imports_of(name) & (parts - {name}), name


def test_parts_the_recipe_and_the_command_line_import_no_torch():
    """One process imports all that a recipe is checked with."""
    modules = [f"finetune.{folder}.{name}" for role, folder in FOLDERS.items() for name in part_names(role)]
    modules += ["finetune", "finetune.commands.cli", "finetune.recipe.load", "finetune.commands.check"]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "    imported = {'torch', 'transformers', 'numpy', 'sklearn'} & sys.modules.keys()\n"
        "    assert not imported, (name, imported)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_training_starts_without_torchs_compiler():
    code = (
        "import sys, finetune.training.sweep, finetune.merging.merge\n"
        "assert {'bitsandbytes', 'trl'} <= sys.modules.keys() and 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
