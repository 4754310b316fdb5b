"""Pages that scripts write are what the scripts would write now."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest.mock import patch

import pytest
from documents import ROOT

from finetune.recipe.load import load_recipe


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_page", ROOT / "docs" / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    with patch.dict(os.environ):  # which a script sets for itself
        spec.loader.exec_module(module)
    return module


def test_the_reference_of_keys_is_the_schema():
    reference = script("reference")
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "run: python docs/tools/reference.py"


def test_every_key_and_option_is_described():
    rows = [line.strip("| ").split(" | ") for line in script("reference").page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100 and all(len(row) == 4 and row[3] for row in rows)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_of_cards_is_that_of_the_program(language):
    tables = script("plan_tables")
    text = tables.PAGES[language].read_text(encoding="utf-8")
    assert tables.between(text, "cards")[0] == tables.cards(language), "run: python docs/tools/plan_tables.py"
    assert text.count("not verified") >= 5  # the guesses among the rents are shown as such, and explained


def test_the_table_of_plans_is_of_the_recipes_and_of_their_models():
    tables = script("plan_tables")
    for page in tables.PAGES.values():
        rows = tables.between(page.read_text(encoding="utf-8"), "recipes")[0].splitlines()[2:]
        for row, name in zip(rows, tables.RECIPES, strict=True):
            recipe, llm, encoder, *_ = row.strip("| ").split(" | ")
            model = load_recipe(ROOT / "recipes" / f"{name}.yaml").model
            assert recipe == f"`{name}`" and model.llm.name.endswith(f"/{llm}")
            assert ", ".join(part.options.name.split("/")[-1] for part in model.encoders.values()) == encoder


@pytest.mark.slow
def test_the_plan_in_the_documents_is_what_plan_says():
    """The listing; the table of recipes takes minutes."""
    tables = script("plan_tables")
    listed = tables.listing()
    for page in tables.PAGES.values():
        written = tables.between(page.read_text(encoding="utf-8"), "listing")[0]
        assert written == listed, "run: python docs/tools/plan_tables.py"


def test_the_support_matrix_in_chinese_is_that_in_english():
    support = script("support")
    written = support.PAGE.read_text(encoding="utf-8")
    assert support.CHINESE_PAGE.read_text(encoding="utf-8") == support.chinese(written)


@pytest.mark.slow
def test_the_support_matrix_is_what_trains_merges_and_exports_now():
    """A cell of five, and three models' exports; `docs/tools/support.py --check` tries all."""
    support = script("support")
    page = support.PAGE.read_text(encoding="utf-8")

    class Sample(support.Trials):
        """The cells that it doesn't try stay as they are written."""

        def __init__(self, folder):
            super().__init__(folder)
            self.written, self.tried, self.cells, self.models = written_cells(page), 0, 0, 0

        def cell(self, *arguments):
            self.cells += 1
            (cell, reason), tried = next(self.written), self.cells % 5 == 1
            self.tried += tried
            return super().cell(*arguments) if tried else self.refusal(reason) if reason else cell

        def exports(self, source, changes, targets):
            self.models += 1
            row, tried = [next(self.written) for _ in targets], self.models % 3 == 1
            self.tried += tried
            return super().exports(source, changes, targets) if tried else [self.refusal(r) if r else c for c, r in row]

    trials = []
    assert support.page(lambda folder: trials.append(Sample(folder)) or trials[0]) == page, (
        "run: python docs/tools/support.py"
    )
    assert trials[0].tried >= 15 and not list(trials[0].written)


def written_cells(page: str) -> Iterator[tuple[str, str]]:
    """(cell, the reason of a refusal), chapter by chapter, of those that are trained."""
    for chapter in page.split("\n## ")[1:]:
        if chapter.startswith("Projectors"):
            continue
        lines = chapter.splitlines()
        reasons = {f"[{line.partition('. ')[0]}]": line.partition(". ")[2] for line in lines if line[:1].isdigit()}
        for line in [line for line in lines if line.startswith("|")][2:]:
            yield from ((cell, reasons.get(cell, "")) for cell in line.strip("| ").split(" | ")[1:])


def test_the_table_of_families_names_all_and_is_the_same_in_chinese():
    families = script("family_table")
    rows = families.written_rows()
    shown = [(name, medium) for name, family in families.ZOO.items() for medium in family.media if medium != "video"]
    assert [tuple(row.strip("| ").split(" | ")[:2]) for row in rows] == [
        (families.NAMES[name], medium) for name, medium in shown
    ]
    for language, page in families.PAGES.items():
        assert families.between(page.read_text(encoding="utf-8"))[0] == families.table(rows, language)


@pytest.mark.slow
def test_a_family_s_row_is_what_is_measured_now(tmp_path):
    families = script("family_table")
    name = families.NAMES["qwen2_5_vl"]
    written = next(row for row in families.written_rows() if row.startswith(f"| {name} | image |"))
    _, _, *cells = written.strip("| ").split(" | ")
    assert families.measure("qwen2_5_vl", "image", tmp_path, cells, engines_only=False).row == written
