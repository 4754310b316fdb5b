import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import cli

from finetune.common.version import DISTRIBUTION, VERSION

ROOT = Path(__file__).resolve().parents[2]


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
    assert done.returncode == 2 and "task.rank: did you mean 'tasks.rank'?" in done.stderr


def test_the_version_is_that_of_the_distribution_and_imports_nothing_slow():
    code = (
        "import runpy, sys\nsys.argv = ['finetune', '--version']\n"
        "try:\n    runpy.run_module('finetune.commands.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "slow = {'torch', 'transformers', 'numpy', 'datasets', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"finetune {VERSION}\n"


def test_the_wheel_has_the_version_and_the_name():
    metadata = pytest.importorskip("hatchling.metadata.core")
    plugins = pytest.importorskip("hatchling.plugin.manager")
    project = metadata.ProjectMetadata(str(ROOT), plugins.PluginManager())
    assert (project.name, project.version) == (DISTRIBUTION, VERSION)
