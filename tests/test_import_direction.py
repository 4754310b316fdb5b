"""Imports go one way, and a part or a stage never imports its sibling."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.parts import part_names

PACKAGE = Path(finetune.__file__).parent
PART_FOLDERS = ("encoders", "projectors", "fusion", "heads", "tasks", "data.formats", "export")
LEVELS = (
    ("errors",),
    (
        "parts",
        "run_folder",
        "certificate",
        "hub",
        "strict_yaml",
        "metrics",
        "plots",
        "energy",
        "progress",
        "conflicts",
        "recipe",
    ),
    ("media",),
    ("data", "encoders", "projectors", "fusion", "heads", "tasks", "sources", "reporting"),
    ("model", "adapter", "language_model", "key_map"),
    ("assemble", "trainer", "assistant", "prepare", "scores", "validation"),
    ("export", "serving", "publishing", "merging", "auto", "processor"),
    ("stages",),
    ("pipeline", "cli"),
)


def module_name(path: Path) -> str:
    """'data.pack' of finetune/data/pack.py; a package is its folder's name, finetune itself ''."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, module_level_only: bool = False) -> set[str]:
    """Modules of the package that a module imports; those for type checkers alone don't count."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found: set[str] = set()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            above = (node.module or "").split(".")
            if above[0] == "finetune":
                inside = ".".join(above[1:])
                below = {f"{inside}.{alias.name}".strip(".") for alias in node.names}
                found |= {module if module in MODULES else inside for module in below}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("finetune").strip(".") for alias in node.names if "finetune" in alias.name
            }
        elif not (module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found - {name}


def level_of(name: str) -> int:
    return next(number for number, heads in enumerate(LEVELS) if name.split(".")[0] in heads)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_a_module_imports_nothing_above_it(name):
    above = {other for other in imports_of(name) - {""} if level_of(other) > level_of(name)}
    assert not above, f"{name} imports {above}"


def test_only_the_command_line_imports_the_public_names():
    assert {name for name in MODULES if name and "" in imports_of(name)} <= {"cli"}


@pytest.mark.parametrize("folder", ["stages", *PART_FOLDERS])
def test_siblings_do_not_import_each_other(folder):
    siblings = {name for name in MODULES if name.startswith(f"{folder}.") and name.count(".") == folder.count(".") + 1}
    assert siblings
    for name in siblings:
        shared = {sibling for sibling in siblings if sibling.rpartition(".")[2].startswith("_")}
        assert not imports_of(name) & (siblings - shared - {name}), name


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports_of(name, module_level_only=True) for name in MODULES}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_parts_the_recipe_and_the_command_line_import_no_torch():
    """One process imports all that a recipe is checked with."""
    modules = [f"finetune.{folder}.{name}" for folder in PART_FOLDERS for name in part_names(folder)]
    modules += ["finetune", "finetune.cli", "finetune.recipe", "finetune.stages.check"]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "    found = {'torch', 'transformers', 'numpy', 'sklearn'} & sys.modules.keys()\n"
        "    assert not found, (name, found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
