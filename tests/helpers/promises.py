"""The tests that SECURITY.md and docs/guarantees.md name beside what they promise."""

import re

from documents import ROOT

PAGES = ("SECURITY.md", "docs/guarantees.md")
HEADER = "| promise | tests |\n|---|---|\n"


def promises(page: str) -> list[list[tuple[str, str]]]:
    """Of each promise of a page the (file, test) that prove it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [row for table in text.split(HEADER)[1:] for row in table.split("\n\n")[0].splitlines()]
    return [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
