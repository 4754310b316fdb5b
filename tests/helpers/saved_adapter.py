"""The adapter folder of tests/fixtures as it stands on a machine: with its LLM and encoder beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.data.sample import Medium, Message

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "base"
SAVED = FIXTURES / "adapter"
PICTURE = BASE / "picture.png"


def saved_adapter(to: Path) -> Path:
    """A copy, TO/adapter, whose LLM and encoder are found."""
    folder = shutil.copytree(SAVED, to / "adapter", ignore=shutil.ignore_patterns("expected.json"))
    for file in folder.glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("BASE/", f"{BASE}/"), encoding="utf-8")
    return folder


def expected_responses() -> dict[str, Any]:
    return json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))


def responses_of(assistant: Any, picture: Path) -> dict[str, Any]:
    """What must stay as it is: an answer, probabilities, logits of text, and projected rows."""
    question = (Message("user", (Medium("image", picture), "What is this?")),)
    with torch.no_grad():
        logits = assistant.model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, -1, :16]
        rows, _ = assistant.model.project("image", [torch.linspace(-1, 1, 256).view(1, 16, 16)])
    return {
        "answer": assistant.answers([question], max_new_tokens=8)[0],
        "logits": logits.tolist(),
        "projected": rows[0, :16].tolist(),
        "probabilities": assistant.probabilities("What is this?", image=picture),
    }
