"""What SECURITY.md and docs/guarantees.md promise is tied to tests that are there."""

import re

import pytest
from documents import ROOT
from promises import PAGES, promises

FILES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_names_tests_that_exist(page):
    found = promises(page)
    assert len(found) > 10
    for tests in found:
        assert tests
        for file, test in tests:
            assert re.search(rf"^(async )?def {test}\(", FILES[file], re.MULTILINE), (file, test)
