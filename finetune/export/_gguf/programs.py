"""llama.cpp's folder and programs."""

import os
import shutil
import subprocess
from pathlib import Path

from finetune.common.errors import ExportRefused
from finetune.export._contract import EngineMissing

FOLDER = "FINETUNE_LLAMA_CPP"
INSTALL = (
    "run tests/engines/install_llama_cpp.sh DIR, or clone https://github.com/ggml-org/llama.cpp and build its "
    f"llama-server and llama-quantize; then name its folder by the variable {FOLDER} or `--option llama_cpp=DIR`"
)


def sources_of(given: str | None) -> Path:
    """llama.cpp's folder, with its converter. Raises ExportRefused."""
    folder = given or os.environ.get(FOLDER)
    if not folder:
        raise ExportRefused(f"gguf: llama.cpp's converter is needed: {INSTALL}")
    path = Path(folder).absolute()
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise ExportRefused(f"gguf: {path} holds no convert_hf_to_gguf.py: {INSTALL}")
    return path


def program(name: str, given: str | None) -> str:
    """The path of one of llama.cpp's programs: in its folder, else on the PATH. Raises EngineMissing."""
    folder = given or os.environ.get(FOLDER)
    places = [Path(folder).absolute() / below / name for below in ("build/bin", "bin", ".")] if folder else []
    found = next((str(place) for place in places if place.is_file()), None) or shutil.which(name)
    if found is None:
        raise EngineMissing(f"llama.cpp's {name} isn't here: {INSTALL}")
    return found


def version_of(server: str) -> str:
    """As llama-server tells it, on one line: '0.5.0-dev (build 1, commit 0c1e570)'."""
    done = subprocess.run([server, "--version"], capture_output=True, text=True, errors="replace")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version:")]
    return lines[0].removeprefix("version:").strip() if lines else "of unknown version"
