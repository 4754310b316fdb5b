import pytest
import torch
from cli import cli


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
def test_too_little_memory_is_said_in_one_line(error, monkeypatch):
    monkeypatch.setattr("finetune.recipe.schema.schema", raising(error))
    done = cli("schema")
    assert done.returncode == 1 and done.stderr.startswith("out of memory: ") and done.stderr.count("\n") == 1


def test_other_errors_of_the_program_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("finetune.recipe.schema.schema", raising(RuntimeError("a mistake of ours")))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli("schema")


def raising(error: BaseException):
    def schema():
        raise error

    return schema


def test_the_options_of_one_part_are_printed_to_read():
    printed = cli("schema", "tasks.rank").stdout
    assert "group: Column of the user" in printed and "(default 'group')" in printed
    done = cli("schema", "task.rank")
    assert done.returncode == 2 and "task.rank: write 'serve'" in done.stderr
