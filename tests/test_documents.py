"""What the documents name exists: links, headings, files, commands and their options, make targets, extras, recipes."""

import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

from finetune.commands.cli import app
from finetune.common.registry import FOLDERS, part_names
from finetune.common.version import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[1]
FOLDERS_OF_DOCUMENTS = ("docs", "recipes", "benchmarks", ".github")
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(file for name in FOLDERS_OF_DOCUMENTS for file in (ROOT / name).rglob("*.md"))}
)
HISTORY = {"LOG.md", "CHANGELOG.md"}  # they name files and targets of the past
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
PATTERNS = ("*.py", "*.yaml", "*.sh", "*.ipynb", "*.jinja", "*.html")
INSTALL = re.compile(r"pip install ([^`;&|#)\n]*)")
OURS = re.compile(r"(?P<name>\.|finetune[\w-]*)(\[(?P<extras>[\w,-]+)\])?")
COMMAND = re.compile(r"(?:^|[\s/`])finetune +((?:data +)?[a-z_]+)\b(.*)")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every = pytest.mark.parametrize("document", DOCUMENTS, ids=relative)


def tokens_of(document: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def code_of(document: Path) -> list[str]:
    """Lines of code blocks, and code within text."""
    kinds = ("fence", "code_block", "code_inline")
    return [line for token in tokens_of(document) if token.type in kinds for line in token.content.splitlines()]


def links_of(document: Path) -> list[str]:
    links = []
    for token in tokens_of(document):
        links += [str(token.attrs[key]) for key in ("href", "src") if key in token.attrs]
        if token.type.startswith("html"):
            links += re.findall(r'(?:href|src)="([^"]+)"', token.content)
    return [link for link in links if not re.match(r"[a-z]+:", link)]


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
    [("README.md", "| to | start with", 2), ("recipes/README.md", "| recipe | learns", 1)],
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
    for folder, pattern in itertools.product(("finetune", "recipes", "benchmarks", "docs", "tests/engines"), PATTERNS):
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
    places = {"pyproject.toml", "Makefile", "README.md", "docs/serve.md", "recipes/radiology.yaml"}
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


def test_the_table_of_commands_is_complete():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| `finetune ([a-z ]+?)(?: [A-Z-].*)?` \|", text, flags=re.MULTILINE)
    assert sorted(cells) == sorted(OPTIONS)
