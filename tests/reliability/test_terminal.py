"""What files hold reaches the terminal escaped: nothing commands it, turns its text around, or forges a
line.
"""

import csv
import re
from types import SimpleNamespace

import pytest
from cli import cli
from tiny import tiny_dataset, tiny_picture, tiny_recipe

from finetune.commands.chat import chat

pytestmark = pytest.mark.slow
HOSTILE = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "right to left": "\u202egnp.exe\u2066",
    "backspace": "a\b\b\b\x9b31m",
    "line": "x\nall rows are fine",
}
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "kind", [one if one == "escape" else pytest.param(one, marks=pytest.mark.full) for one in HOSTILE]
)
def test_cells_and_names_are_shown_escaped(kind, tmp_path, tried):
    text = HOSTILE[kind]
    recipe = tiny_recipe(tmp_path)
    tiny_dataset(tmp_path / "data")
    with (tmp_path / "data" / "train.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{text}.png", "red"])  # no such picture
        writer.writerow(["images/train0.png", f"{text} red"])
        writer.writerow([f"images/{text}.png".replace("\x00", ""), text])
    tiny_picture().save(tmp_path / "data" / "images" / f"{text}.png")
    (tmp_path / "data" / "images" / f"{text}x.png").write_bytes(b"no picture")
    outputs = [
        cli("data", "check", recipe, "--out", tmp_path / "check", cwd=tmp_path),
        cli("data", "preview", recipe, "--rows", 20, cwd=tmp_path),
        cli("train", recipe, cwd=tmp_path),
        cli("data", "check", recipe, "--set", f"data.0.path={tmp_path / text}", cwd=tmp_path),
    ]
    assert any(output.returncode == 2 for output in outputs)
    for output in outputs:
        for stream in (output.stdout, output.stderr):
            found = COMMANDS.search(stream)
            assert found is None, (found, stream[max(0, found.start() - 80) : found.end() + 80])
            if kind == "line":
                assert not re.search("^all rows are fine$", stream, re.MULTILINE)
    tried(f"cells and file names with {kind}", "shown escaped")


def test_answers_are_shown_escaped(tmp_path, monkeypatch, capsys, tried):
    """A model writes what its data taught it: escape sequences, too."""
    text = "".join(HOSTILE.values())
    model = SimpleNamespace(bindings={})
    assistant = SimpleNamespace(model=model, only_task=lambda: None, answers=lambda *_, **__: [text])
    monkeypatch.setattr("finetune.commands.chat.load", lambda _: assistant)
    monkeypatch.setattr("finetune.model.trained_for.refuse_missing", lambda _: None)
    said = iter(["What is this?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert chat(tmp_path) == text  # to Python, as it is
    shown = [capsys.readouterr().out, cli("chat", tmp_path, "What is this?").stdout]
    for stream in shown:
        assert "\\x1b[2J" in stream and not COMMANDS.search(stream)
    tried("answers with escape sequences in `finetune chat`", "shown escaped")
