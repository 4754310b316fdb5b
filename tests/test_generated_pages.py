"""Pages that scripts write are what the scripts would write now."""

import importlib.util
import os
import sys
from types import ModuleType
from unittest.mock import patch

import pytest
from documents import ROOT

from finetune.recipe.load import load_recipe


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
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
            assert [part.options.name.split("/")[-1] for part in model.encoders.values()] == [encoder]


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
    support = script("support")
    assert support.page() == support.PAGE.read_text(encoding="utf-8"), "run: python docs/tools/support.py"
