"""What is tried here is promised to users: in docs/guarantees.md or SECURITY.md."""

from pathlib import Path

import pytest
from promises import PAGES, promises


@pytest.mark.full
def test_every_file_proves_a_promise():
    named = {file for page in PAGES for tests in promises(page) for file, _ in tests}
    assert {path.name for path in Path(__file__).parent.glob("test_*.py")} - named == {Path(__file__).name}
