"""Disks, the Hub, codecs, other engines."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune.commands._doctor.finding import Diagnostic
from finetune.common.errors import ExportRefused
from finetune.common.gpu import GIB
from finetune.common.hub import CONNECT, PROBE_SECONDS, unreachable
from finetune.export._contract import EngineMissing

LEAST_DISK = 5 * GIB
NO_DISK = GIB // 4
DECODERS = ("aac", "flac", "mp3", "opus", "vorbis", "av1", "h264", "hevc", "vp8", "vp9")


def disk() -> Iterator[Diagnostic]:
    from huggingface_hub import constants

    yield _folder("working folder", Path.cwd(), "work in a folder on another disk")
    yield _folder("cache of the Hub", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder on another disk")
    yield _folder("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder on another disk")


def _folder(what: str, folder: Path, fix: str) -> Diagnostic:
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    seen = f"{what}, {folder}: {free / GIB:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Diagnostic("disk", "error", f"{what}, {folder}: can't be written", fix)
    if free < LEAST_DISK:
        return Diagnostic("disk", "error" if free < NO_DISK else "warning", seen, f"free some, or {fix}")
    return Diagnostic("disk", "ok", seen)


def hub() -> Iterator[Diagnostic]:
    """Within PROBE_SECONDS, and once more for the token."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        yield Diagnostic("hub", "ok", "HF_HUB_OFFLINE is set: only folders and the cache are read")
        return
    if why := unreachable():
        yield Diagnostic("hub", "warning", f"{why}; models and datasets in the cache can be loaded", CONNECT)
        return
    yield Diagnostic("hub", "ok", f"{constants.ENDPOINT} answers")
    if token := get_token():
        yield _token(token)
    else:
        yield Diagnostic("hub", "ok", "no token: gated and private models can't be loaded", "hf auth login")


def _token(token: str) -> Diagnostic:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token)
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=PROBE_SECONDS)
    if response.status_code == 401:
        return Diagnostic(
            "hub",
            "error",
            "the token isn't valid, and public models are refused with it too",
            "hf auth login, or unset HF_TOKEN",
        )
    if response.status_code != 200:
        return Diagnostic("hub", "warning", f"the Hub, asked whose token this is, answers {response.status_code}")
    return Diagnostic("hub", "ok", f"logged in as {response.json()['name']}")


def codecs() -> Iterator[Diagnostic]:
    import av

    def decodes(name: str) -> bool:
        try:
            return bool(av.Codec(name, "r"))
        except ValueError:  # PyAV's UnknownCodecError
            return False

    missing = [name for name in DECODERS if not decodes(name)]
    if missing:
        fix = "pip install --force-reinstall --no-deps --only-binary av av: the wheel from PyPI has them"
        yield Diagnostic("codecs", "warning", f"PyAV {av.__version__} can't decode {', '.join(missing)}", fix)
    else:
        yield Diagnostic("codecs", "ok", f"PyAV {av.__version__} decodes {', '.join(DECODERS)}")


def engines() -> Iterator[Diagnostic]:
    """Those that environment variables name."""
    from finetune.export._gguf import programs
    from finetune.export._vllm import environment

    if python := os.environ.get(environment.VARIABLE):
        try:
            yield Diagnostic(
                "vLLM", "ok", f"{environment.version_of(environment.find_python(None), plugin=False)}, {python}"
            )
        except EngineMissing as error:
            yield Diagnostic("vLLM", "error", f"{environment.VARIABLE} is set: {error}", environment.INSTALL)
    if folder := os.environ.get(programs.VARIABLE):
        try:
            programs.find_sources(None)
            server = programs.find_program("llama-server", None)
            programs.find_program("llama-quantize", None)
            yield Diagnostic("llama.cpp", "ok", f"{programs.version_of(server)}, {folder}")
        except (EngineMissing, ExportRefused) as error:
            yield Diagnostic("llama.cpp", "error", f"{programs.VARIABLE} is set: {error}", programs.INSTALL)
