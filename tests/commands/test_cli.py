import sys

import pytest
import torch

from finetune.commands import cli
from finetune.common.errors import RecipeError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory (os error 12)"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["python", "torch on a CPU", "torch on a GPU"],
)
def test_too_little_memory_is_said_in_one_line(error, monkeypatch, capsys):
    def schema():
        raise error

    monkeypatch.setattr("finetune.recipe.schema", schema)
    monkeypatch.setattr(sys, "argv", ["finetune", "schema"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.startswith("out of memory: ") and said.count("\n") == 1


def test_other_errors_of_the_program_keep_their_traceback(monkeypatch):
    def schema():
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("finetune.recipe.schema", schema)
    monkeypatch.setattr(sys, "argv", ["finetune", "schema"])
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main()


def test_the_options_of_one_part_are_printed_to_read(capsys):
    cli.schema("tasks.rank")
    printed = capsys.readouterr().out
    assert "group: Column of the user" in printed and "(default 'group')" in printed
    with pytest.raises(RecipeError, match=r"task\.rank: write 'serve'"):
        cli.schema("task.rank")
