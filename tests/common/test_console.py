"""Lines reach the terminal as they are, however long the paths in them, and whatever these hold."""

import contextlib
import os
import pty
import re
import sys

import pytest
from PIL import Image
from rich.progress import Progress
from tiny import tiny_recipe

from finetune.common.console import plain_console
from finetune.common.display import picture
from finetune.common.progress import bar, console
from finetune.training.train import train

ODD = "[/x] [bold] :smile: " + "a" * 200


@pytest.mark.parametrize("stderr", [False, True])
def test_a_line_is_neither_broken_nor_read_as_markup(stderr, capsys):
    (console if stderr else plain_console()).print(ODD)
    out, err = capsys.readouterr()
    assert (err if stderr else out) == f"{ODD}\n"


def test_in_a_notebook_a_line_is_text_on_stdout(monkeypatch, capsys):
    """Rich's own HTML cuts it at the right edge of the cell."""
    monkeypatch.setattr("finetune.common.console.IN_NOTEBOOK", True)
    plain_console(stderr=True).print(ODD)
    assert tuple(capsys.readouterr()) == (f"{ODD}\n", "")


def test_the_text_of_a_bar_is_no_markup(capsys):
    with bar("[/x]", 1) as step:
        step("[/y]")
    assert "[/x]" in capsys.readouterr().err


def test_a_bar_fits_a_narrow_terminal_all_the_same(monkeypatch, capsys):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", 40)
    with bar("b" * 30, 1) as step:
        step("c" * 60)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = re.split(r"[\r\n]+", shown)
    assert "bbb" in shown and max(map(len, lines)) <= 40


def test_a_run_in_a_folder_with_a_long_name_and_brackets_tells_where_its_adapter_is(tmp_path, capsys):
    stage = {"name": "align", "trains": ["projectors"], "learning_rate": 1e-3}
    run = train(tiny_recipe(tmp_path, train__stages=[stage]), tmp_path / ODD)
    assert f"adapter: {run.adapter}\n" in capsys.readouterr().err
    train(tiny_recipe(tmp_path, train__stages=[stage]), run, resume=True)
    assert f"adapter: {run.adapter}\n" in capsys.readouterr().err


def test_a_plot_in_a_notebook_is_as_large_as_it_was_drawn(tmp_path):
    Image.new("RGB", (1125, 300)).save(tmp_path / "a.png")
    assert "width: 720px; max-width: 100%" in picture(tmp_path / "a.png")


def test_a_terminal_that_is_closed_ends_nothing_before_its_signal():
    """The kernel refuses writing first, and sends SIGHUP then."""
    master, slave = pty.openpty()
    os.close(master)
    gone = os.fdopen(slave, "w")
    with contextlib.redirect_stderr(gone), pytest.raises(OSError, match="Input/output error"):
        print("to nobody", file=sys.stderr, flush=True)
    console = plain_console(stderr=True)
    with contextlib.redirect_stderr(gone), Progress(console=console) as progress:
        console.print("to nobody")
        progress.advance(progress.add_task("work"))
    with contextlib.suppress(OSError):
        gone.close()
