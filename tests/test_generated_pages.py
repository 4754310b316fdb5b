"""Pages that scripts write are what the scripts would write now."""

import importlib.util
from types import ModuleType

import pytest
from documents import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_keys_is_the_schema():
    reference = script("reference")
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "run: python docs/tools/reference.py"


def test_every_key_and_option_is_described():
    rows = [line.strip("| ").split(" | ") for line in script("reference").page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100 and all(len(row) == 4 and row[3] for row in rows)


@pytest.mark.slow
def test_the_support_matrix_is_what_trains_merges_and_exports_now():
    support = script("support")
    assert support.page() == support.PAGE.read_text(encoding="utf-8"), "run: python docs/tools/support.py"
