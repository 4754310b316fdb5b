"""Execute notebooks from top to bottom, in an environment as Colab's, on small models, few rows and a Hub on loopback.

    ENVIRONMENT/bin/python tests/notebooks/run.py [--into FOLDER] [NAME.ipynb ...]

The environment is what make_environment.sh makes; the first notebook's first cell installs the kit into it. Nothing in
a notebook is for tests: settings are changed as a reader changes them, by a cell after the settings; tables of the
repository are cut in a copy of it; the Hub serves small models by the names that the notebooks give. English notebooks
have a token and publish, Chinese ones have none.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from time import perf_counter
from typing import Any

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from hub_server import TOKEN, Hub, Repository  # noqa: E402

sys.path.insert(0, str(ROOT / "notebooks"))
from lock import pins  # noqa: E402

ROWS = {"train.csv": 32, "test.csv": 8}
SETTINGS = {
    "DTYPE": "float32",
    "EPOCHS": 1,
    "PICTURES": 40,
    "CHANGES": "train.stages.1.epochs=1 evaluate.max_new_tokens=8",
}
MODELS = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("llm", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"),
    "google/siglip-base-patch16-224": ("siglip", "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed"),
    "openai/whisper-small": ("whisper", "973afd24965f72e36ca33b3055d56a652f456b4d"),
}
NOT_HERE = re.compile("(torch|torchvision|triton|nvidia-nccl.*|cuda-.*|torchao)$")  # of CUDA; torchao is removed
LOADED = "import numpy, PIL.Image, psutil, pydantic, rich.console, torch"  # as in a fresh kernel of Colab, and torch
UNCHANGED = """
from finetune.commands._doctor.packages import replaced

assert not [*replaced()], [*replaced()]
assert all((RUN / name).exists() for name in ("adapter", "metrics.json", "certificate.json", "published")), RUN
"""


def other_versions() -> str | None:
    """What differs from Colab's versions with the lock over them; None if nothing does."""
    files = [ROOT / "notebooks" / name for name in ("colab-versions.txt", "colab-lock.txt")]
    wanted = {name: pin for file in files for name, pin in pins(file.read_text(encoding="utf-8")).items()}
    there = {re.sub("[-_.]+", "-", one.name).lower(): one.version for one in distributions()}
    others = [
        f"{name} is {there.get(name)}, not {pin}"
        for name, pin in wanted.items()
        if there.get(name) != pin and not NOT_HERE.match(name)
    ]
    return f"the environment has other versions: {', '.join(others)}" if others else None


def small_kit(folder: Path) -> None:
    """The repository with shorter tables."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "notebooks/install.sh").chmod(0o755)
    for table in folder.glob("recipes/data/*/t*.csv"):
        with open(table, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        with open(table, "w", newline="", encoding="utf-8") as file:
            step = max(1, len(rows) // ROWS.get(table.name, 8))
            csv.writer(file).writerows([header, *rows[::step][: ROWS.get(table.name, 8)]])


def small_hub(folder: Path) -> Hub:
    hub = Hub()
    for name, (kind, commit) in MODELS.items():
        hub.add(name, folder / kind)
        hub.repositories[name] = Repository({commit: hub.repositories[name].files})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


def prepared(path: Path) -> nbformat.NotebookNode:
    """The notebook with small settings, and with checks of the kernel before and after."""
    notebook = nbformat.read(path, as_version=4)
    titles = ("# @title Settings", "# @title 设置")
    (number,) = (n for n, cell in enumerate(notebook.cells) if cell.source.startswith(titles))
    known, settings = notebook.cells[number].source, SETTINGS | {"REPO": f"tiny-{path.stem}"}
    lines = [f"{name} = {value!r}" for name, value in settings.items() if f"\n{name} = " in known]
    notebook.cells.insert(number + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(LOADED))
    notebook.cells.append(nbformat.v4.new_code_cell(UNCHANGED))
    return notebook


def environment_of(folder: Path, hub: Hub, token: str) -> dict[str, str]:
    """What a kernel in the folder is started with."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    environment = os.environ | {"PATH": programs, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token, "XDG_CACHE_HOME": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment |= {"PIP_CACHE_DIR": str(cache / "pip"), "PIP_NO_COMPILE": "1"}  # what is imported is compiled then
    for name in ("HF_HUB_OFFLINE", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH"):
        environment.pop(name, None)
    return environment


def execute(
    path: Path, scratch: Path, hub: Hub, into: Path | None = None, installed: threading.Event | None = None
) -> str | None:
    """What went wrong, or None. `installed`: set once the cell that installs the kit has ended."""
    begin = perf_counter()
    folder = scratch / path.name
    folder.mkdir()
    (folder / "kit").symlink_to(scratch / "kit")
    environment = environment_of(folder, hub, "" if ".zh" in path.name else TOKEN)
    notebook = prepared(path)

    def done(cell: nbformat.NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        if installed is not None and cell.source.startswith("%%bash"):
            installed.set()

    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=done,  # `on_cell_complete` is called when it begins
    )
    failure = None
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = str(error)
    finally:
        if installed is not None:
            installed.set()
    if into is not None:
        nbformat.write(notebook, into / path.name)
    published = sorted(name for name in hub.repositories if name == f"me/tiny-{path.stem}")
    if failure is None and bool(published) != bool(environment["HF_TOKEN"]):
        failure = f"published: {published}"
    print(f"{path.name:<20} {'FAILED' if failure else 'ok':<7} {perf_counter() - begin:.0f} s", flush=True)
    return failure and f"{path.name}: {failure}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="Default: all notebooks.")
    parser.add_argument("--into", type=Path, help="Keep the executed notebooks in this folder.")
    arguments = parser.parse_args()
    if arguments.into:
        arguments.into.mkdir(parents=True, exist_ok=True)
    paths = [ROOT / "notebooks" / name for name in arguments.names] or sorted(ROOT.glob("notebooks/*.ipynb"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "--yes", "finetune-kit"], check=True, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        small_kit(scratch / "kit")
        maker = Path(__file__).with_name("tiny_models.py")
        subprocess.run([sys.executable, str(maker), str(ROOT / "weights"), str(scratch / "models")], check=True)
        hub = small_hub(scratch / "models")
        first, *others = paths
        installed = threading.Event()
        with ThreadPoolExecutor(max_workers=2) as pool:
            running = [pool.submit(execute, first, scratch, hub, arguments.into, installed)]
            installed.wait()
            running += [pool.submit(execute, path, scratch, hub, arguments.into) for path in others]
        failures = [*(one.result() for one in running), other_versions()]
    print(*filter(None, failures), sep="\n\n")
    sys.exit(any(failures))


if __name__ == "__main__":
    main()
