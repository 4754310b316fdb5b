"""llama.cpp's folder and programs."""

import os
import shutil
import subprocess
from pathlib import Path

from finetune.common.errors import ExportRefused
from finetune.export._contract import EngineMissing

VARIABLE = "FINETUNE_LLAMA_CPP"
INSTALL = (
    "run tests/engines/install_llama_cpp.sh DIR, or clone https://github.com/ggml-org/llama.cpp and build its "
    f"llama-server and llama-quantize; then name its folder by the variable {VARIABLE} or by the option `llama_cpp`"
)


def find_sources(option: str | None) -> Path:
    """llama.cpp's folder, with its converter. Raises ExportRefused."""
    folder = option or os.environ.get(VARIABLE)
    if not folder:
        raise ExportRefused(f"gguf: llama.cpp's converter is needed: {INSTALL}")
    path = Path(folder).absolute()
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise ExportRefused(f"gguf: {path} has no convert_hf_to_gguf.py: {INSTALL}")
    return path


def find_program(name: str, option: str | None) -> str:
    """The path of one of llama.cpp's programs: in its folder, else on the PATH. Raises EngineMissing."""
    folder = option or os.environ.get(VARIABLE)
    candidates = [Path(folder).absolute() / below / name for below in ("build/bin", "bin", ".")] if folder else []
    path = next((str(path) for path in candidates if path.is_file()), None) or shutil.which(name)
    if path is None:
        raise EngineMissing(f"llama.cpp's {name} isn't installed: {INSTALL}")
    return path


def version_of(server: str) -> str:
    """llama-server's version on one line: '0.5.0-dev (build 1, commit 0c1e570)'."""
    process = subprocess.run([server, "--version"], capture_output=True, text=True, errors="replace")
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line.startswith("version:")]
    return lines[0].removeprefix("version:").strip() if lines else "of unknown version"
