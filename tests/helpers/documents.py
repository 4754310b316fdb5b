"""The documents of the repository, and what stands in them."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
FOLDERS_OF_DOCUMENTS = ("docs", "recipes", "benchmarks", "notebooks", ".github")
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(file for name in FOLDERS_OF_DOCUMENTS for file in (ROOT / name).rglob("*.md"))}
)
HISTORY = {"LOG.md", "CHANGELOG.md"}  # they name files and targets of the past
TRANSLATED = [path for path in DOCUMENTS if path.name.endswith(".zh.md")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tokens_of(document: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def fences_of(document: Path, *languages: str) -> list[str]:
    """Code blocks in one of these languages ('' for none)."""
    return [token.content for token in tokens_of(document) if token.type == "fence" and token.info in languages]


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
    return [unquote(link) for link in links if not re.match(r"[a-z]+:", link)]
