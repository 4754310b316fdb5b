"""llama.cpp's OpenAI server in a process of its own: started, asked, stopped for sure."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finetune.data.sample import Medium, Message
from finetune.errors import ExportRefused
from finetune.export._contract import EngineMissing
from finetune.media import decode

FOLDER = "FINETUNE_LLAMA_CPP"
INSTALL = (
    "run tests/engines/install_llama_cpp.sh DIR, or clone https://github.com/ggml-org/llama.cpp and build its "
    f"llama-server and llama-quantize; then name its folder by the variable {FOLDER} or `--option llama_cpp=DIR`"
)
ANSWER_SECONDS = 600.0
STOP_SECONDS = 10.0


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


@contextmanager
def serving(server: str, arguments: Sequence[str], start_seconds: float) -> Iterator[str]:
    """The base URL of llama-server on a free port of this machine, until the block ends.

    Raises ExportRefused where it doesn't start in time, with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "--host", "127.0.0.1", "--port", str(port), *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, start_seconds, log)
            yield url
        finally:
            _stop(process)


def ask(url: str, messages: Sequence[Message], max_new_tokens: int) -> tuple[int, ...]:
    """The token ids of what is answered greedily, an end token among them. Raises ExportRefused."""
    body = {
        "messages": [{"role": message.role, "content": content_of(message)} for message in messages],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "logprobs": True,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            told = json.load(response)["choices"][0].get("logprobs") or {"content": []}
    except urllib.error.HTTPError as error:
        raise ExportRefused(f"llama.cpp refuses a question: {error.read().decode(errors='replace')[:400]}") from None
    except (OSError, ValueError, LookupError) as error:
        raise ExportRefused(f"llama.cpp gave no answer to a question: {error}") from None
    return tuple(token["id"] for token in told["content"])


def content_of(message: Message) -> list[dict[str, Any]]:
    """A turn's parts as OpenAI's API has them; text that follows text is one, as llama.cpp would break the line
    between. Media are decoded here and sent without loss, so that models are compared, not decoders.
    """
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, Medium):
            parts.append(_sent(part))
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part
        else:
            parts.append({"type": "text", "text": part})
    return parts


def _sent(medium: Medium) -> dict[str, Any]:
    import soundfile

    from finetune.media.audio import RATE

    decoded, file = decode(medium.kind, medium.path), io.BytesIO()
    if medium.kind == "image":
        decoded.save(file, "PNG")
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(file)}"}}
    soundfile.write(file, decoded, RATE, format="WAV", subtype="FLOAT")
    return {"type": "input_audio", "input_audio": {"data": _base64(file), "format": "wav"}}


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def _wait(process: "subprocess.Popen[bytes]", url: str, seconds: float, log: IO[bytes]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ExportRefused(f"llama-server stopped with status {process.returncode}:\n{_last_lines(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise ExportRefused(
        f"llama-server hasn't started within {seconds:g} s (`--option start_seconds=...` gives it more):\n"
        + _last_lines(log)
    )


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if " E " in line or "error" in line.lower()]
    return "\n".join((errors or lines)[-6:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, how)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
