"""A page in Chinese has the headings, code, tables and links of the page in English."""

import re
from pathlib import Path

import pytest
import yaml
from documents import ROOT, TRANSLATED, links_of, relative, tokens_of

MUST_EXIST = {"README", "docs/index", "docs/data", "docs/data-check", "docs/commands", "docs/troubleshooting"}
MUST_EXIST |= {f"docs/{name}" for name in ("init", "plan", "predict", "python", "choosing", "concepts", "serve")}
MUST_EXIST |= {
    relative(path).removesuffix(".md") for path in (ROOT / "docs/tutorials").glob("*.md") if ".zh" not in path.name
}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def original(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.md", ".md"))


def test_pages_that_beginners_need_are_there_in_chinese():
    assert {relative(path).removesuffix(".zh.md") for path in TRANSLATED} >= MUST_EXIST


def inline_code_of(page: Path) -> list[str]:
    return sorted(token.content for token in tokens_of(page) if token.type == "code_inline")


def shape(page: Path) -> list[str]:
    """Headings with their level, code with its language and number of lines, tables with their cells, in order."""
    parts = []
    for token in tokens_of(page):
        if token.type in ("heading_open", "th_open", "td_open", "list_item_open"):
            parts.append(token.tag)
        elif token.type == "fence":
            parts.append(f"{token.info} {len(token.content.splitlines())}")
    return parts


@pytest.mark.parametrize("page", TRANSLATED, ids=relative)
def test_a_translation_has_the_structure_of_its_original(page):
    assert shape(page) == shape(original(page))


@pytest.mark.parametrize("page", TRANSLATED, ids=relative)
def test_a_translation_names_the_code_that_its_original_names(page):
    """Each piece as often; the words around it may come in another order."""
    assert inline_code_of(page) == inline_code_of(original(page))


@pytest.mark.parametrize("page", TRANSLATED, ids=relative)
def test_a_translation_has_the_links_of_its_original(page):
    def targets(document: Path) -> list[str]:
        links = (link.partition("#")[0].replace(".zh.md", ".md") for link in links_of(document))
        return sorted(link for link in links if not re.fullmatch(r"README.md", link))

    assert targets(page) == targets(original(page))


@pytest.mark.parametrize("page", TRANSLATED, ids=relative)
def test_a_translation_links_to_translations_and_is_chinese(page):
    for link in links_of(page):
        target = page.parent / link.partition("#")[0]
        if target.name.endswith(".md") and not target.name.endswith(".zh.md") and target.name != "README.md":
            assert not target.with_name(target.name.replace(".md", ".zh.md")).exists(), link
    prose = "".join(token.content for token in tokens_of(page) if token.type == "text")
    assert len(CHINESE.findall(prose)) > len(re.findall(r"[A-Za-z]+", prose)), "not translated"


@pytest.mark.parametrize("page", TRANSLATED, ids=relative)
def test_recipes_of_a_translation_differ_in_words_only(page):
    def keys(value: object) -> object:
        if isinstance(value, dict):
            return {key: "words" if key == "prompt" else keys(below) for key, below in value.items()}
        if isinstance(value, list):
            return [keys(below) for below in value]
        return value

    def recipes(document: Path) -> list[object]:
        blocks = (token.content for token in tokens_of(document) if token.type == "fence" and token.info == "yaml")
        return [keys(yaml.safe_load(block)) for block in blocks]

    assert recipes(page) == recipes(original(page))
