"""What the documents name exists: links, headings, files, commands and their options, make targets, extras, recipes."""

import ast
import itertools
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer.main
import yaml
from documents import DOCUMENTS, HISTORY, ROOT, code_of, links_of, relative

from finetune.commands.cli import app
from finetune.common.registry import FOLDERS, part_names
from finetune.common.version import DISTRIBUTION

RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
PATTERNS = ("*.py", "*.yaml", "*.sh", "*.ipynb", "*.jinja", "*.html")
INSTALL = re.compile(r"pip install ([^`;&|#)\n]*)")
OURS = re.compile(r"(?P<name>\.|finetune[\w-]*)(\[(?P<extras>[\w,-]+)\])?")
COMMAND = re.compile(r"(?:^|[\s/`])finetune +((?:data +)?[a-z_]+)\b(.*)")


every = pytest.mark.parametrize("document", DOCUMENTS, ids=relative)


def anchors_of(document: Path) -> set[str]:
    """The fragments that GitHub gives its headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(document: Path) -> list[tuple[str, str]]:
    """(verb, the rest of its line), as ("data check", "products.yaml")."""
    matches = (COMMAND.search(line.partition("#")[0]) for line in code_of(document))
    return [(" ".join(match[1].split()), match[2]) for match in matches if match]


def options_by_command() -> dict[str, set[str]]:
    options = {}
    pending = [("", typer.main.get_command(app))]
    while pending:
        name, command = pending.pop()
        if children := getattr(command, "commands", None):
            pending += [(f"{name} {child}".strip(), value) for child, value in children.items()]
        else:
            options[name] = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    return options


OPTIONS = options_by_command()


@every
def test_relative_links_resolve(document):
    missing = []
    for link in links_of(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            missing.append(link)
    assert not missing


@every
def test_commands_and_their_options_exist(document):
    for verb, rest in commands_of(document):
        assert verb in OPTIONS, f"finetune {verb}"
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
            assert option in OPTIONS[verb] | {"--help"}, f"finetune {verb} {option}"
        if verb == "schema" and (part := re.match(r" +([a-z]+)\.([a-z_]+)$", rest)):
            assert part[2] in part_names(part[1]), rest


@every
def test_named_recipes_exist(document):
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"(?<![\w/])recipes/([a-z0-9-]+)\.yaml", text)
    for verb, rest in commands_of(document):
        if verb == "recipes":
            names += re.findall(r"--copy ([a-z0-9-]+)", rest)
    assert set(names) <= RECIPES


@pytest.mark.parametrize(
    ("document", "header", "column"),
    [
        ("docs/tutorials/index.md", "| to | start with", 2),
        ("docs/tutorials/index.zh.md", "| 目的 | 从哪份配方开始", 2),
        ("recipes/README.md", "| recipe | learns", 1),
    ],
)
def test_the_tables_of_recipes_are_complete(document, header, column):
    lines = iter((ROOT / document).read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(header))
    named: list[str] = []
    for line in lines:
        if not line.startswith("|"):
            break
        named += re.findall(r"`([\w-]+)`", line.split("|")[column])
    assert sorted(named) == sorted(RECIPES)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in HISTORY], ids=relative)
def test_named_files_and_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in code_of(document):
        if target := re.match(r"make ([a-z-]+)", line):
            assert target[1] in targets, line
        for path in re.findall(r"(?<![\w./-])(?:finetune|tests|benchmarks|docs|\.ci)/[\w./-]+", line):
            assert "NAME" in path or (ROOT / path).exists(), path


def places_of_install_lines() -> list[Path]:
    """Documents that tell of the present, recipes, notebooks, scripts, and the package, which has them in messages."""
    files = [path for path in DOCUMENTS if path.name not in HISTORY]
    for folder, pattern in itertools.product(
        ("finetune", "recipes", "benchmarks", "docs", "notebooks", "tests/engines"), PATTERNS
    ):
        files += [path for path in (ROOT / folder).rglob(pattern) if (ROOT / "recipes" / "data") not in path.parents]
    return [ROOT / "Makefile", *files]


def test_install_lines_name_this_distribution_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    extras = project["optional-dependencies"]
    words = [("pyproject.toml", word) for requirements in extras.values() for word in requirements]
    for path in places_of_install_lines():
        for arguments in INSTALL.findall(path.read_text(encoding="utf-8")):
            words += [(relative(path), word) for word in re.split(r"""[\s'"]+""", arguments)]
    installed: dict[str, set[str]] = {}
    for place, word in words:
        if found := OURS.match(word):
            assert found["name"] in (DISTRIBUTION, "."), f"{place}: {word}"
            installed.setdefault(place, set()).update((found["extras"] or "").split(","))
    for place, named in installed.items():
        assert named - {""} <= set(extras), place
    places = {
        "pyproject.toml",
        "Makefile",
        "README.md",
        "docs/serve.md",
        "notebooks/install.sh",
        "recipes/radiology.yaml",
    }
    assert places <= installed.keys()
    assert {"dicom", "label", "serve"} <= set().union(*(installed[p] for p in installed if p.startswith("finetune/")))


def test_the_table_of_parts_is_complete():
    """docs/parts.md has every part with a table there in some row's first cell, and names no other."""
    text = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    for role in FOLDERS.keys() - {"formats", "export"}:
        section = re.search(rf"^## {role.capitalize()}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert section, role
        cells = re.findall(r"^\| (`[^|]+) \|", section[1], flags=re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(part_names(role)), role


@pytest.mark.parametrize("page", ["commands.md", "commands.zh.md"])
def test_the_table_of_commands_is_complete(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    cells = re.findall(r"^\| `finetune ([a-z ]+?)(?: [A-Z-].*)?` \|", text, flags=re.MULTILINE)
    assert sorted(cells) == sorted(OPTIONS)


def pages_of(entries: list) -> list[str]:
    return [
        page
        for entry in entries
        for value in entry.values()
        for page in (pages_of(value) if isinstance(value, list) else [value])
    ]


def test_every_page_is_in_the_navigation_once():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    named = pages_of(settings["nav"])
    there = {relative(path).removeprefix("docs/") for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert {page for page in there if not page.endswith(".zh.md")} <= set(named)
    assert {page.replace(".zh.md", ".md") for page in there} <= set(named)
    assert set(named) <= there


@cache
def texts_of_the_program() -> str:
    """Every string of the package, with ... where something is put in."""
    texts = []
    for path in (ROOT / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize("page", ["troubleshooting.md", "troubleshooting.zh.md"])
def test_messages_that_are_explained_are_messages_of_the_program(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    cells = re.findall(
        r"^\| `([^`]+)`", text.partition("## Without")[0].partition("## 没有网络")[0], flags=re.MULTILINE
    )
    assert len(cells) > 25
    said = texts_of_the_program()
    unknown = {
        piece for cell in cells for piece in cell.split("...") if piece.strip(" :;,.()") and piece.strip() not in said
    }
    assert not unknown
