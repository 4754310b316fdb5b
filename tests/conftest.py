import gc
import os

gc.disable()  # until all is imported: none of it is garbage
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from finetune.common.progress import quiet_libraries

torch.set_num_threads(1)
quiet_libraries()
# As in the background of a shell and under nohup: the kit would leave them so.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_itemcollected(item):
    if "finished_run" in getattr(item, "fixturenames", ()):  # whoever comes first trains it
        item.add_marker("slow")


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def imported_modules_stay():
    """Stages of a run collect garbage: not again and again among all of torch and transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """finished_run(KIND): a run folder of a kind in helpers/trained_runs.py: trained, evaluated, merged.
    All processes of a session share it and only read: whoever writes takes a copy.
    """
    from trained_runs import file_digests, make_run

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the folder of the session; those of its workers are in it
    digests: dict[Path, dict[str, str]] = {}

    def finished(kind: str) -> Path:
        project, made = shared / f"project-{kind}", shared / f"project-{kind}.json"
        with FileLock(shared / f"project-{kind}.lock"):
            if not made.is_file():
                shutil.rmtree(project, ignore_errors=True)
                project.mkdir()
                run = make_run(kind, project)
                made.write_text(json.dumps(file_digests(run)))
        digests[project / "run"] = json.loads(made.read_text())
        return project / "run"

    yield finished
    for run, before in digests.items():
        after = file_digests(run)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert not changed, f"{run}: a test wrote into a run that all share: {sorted(changed)}"
