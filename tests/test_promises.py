"""What SECURITY.md and docs/guarantees.md promise is tied to tests that are there."""

import re

import pytest
from documents import ROOT

PAGES = ("SECURITY.md", "docs/guarantees.md")
FILES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def promises(page: str) -> list[str]:
    """The table rows of promises."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        row
        for table in text.split("| promise | tests |\n|---|---|\n")[1:]
        for row in table.split("\n\n")[0].splitlines()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_names_tests_that_exist(page):
    rows = promises(page)
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, test in tests:
            assert re.search(rf"^(async )?def {test}\(", FILES[file], re.MULTILINE), (file, test)


def test_every_file_of_reliability_tests_proves_a_promise():
    named = {file for page in PAGES for row in promises(page) for file in re.findall(r"`(test_\w+\.py)::", row)}
    assert {path.name for path in (ROOT / "tests/reliability").glob("test_*.py")} <= named
