"""The folders of tests/fixtures as they stand on a machine: with their LLM and encoder beside them."""

import json
import shutil
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "base"
PICTURE = BASE / "picture.png"


def fixture_folder(name: str, to: Path) -> Path:
    """A copy of a fixture whose LLM and encoder are found."""
    folder = shutil.copytree(FIXTURES / name, to / name, ignore=shutil.ignore_patterns("expected.json"))
    for file in folder.glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("BASE/", f"{BASE}/"), encoding="utf-8")
    return folder


def expected_of(name: str) -> dict:
    return json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
