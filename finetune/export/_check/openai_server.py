"""An engine's OpenAI server in a process group of its own: started, asked, stopped for sure."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from finetune.common.errors import ExportRefused
from finetune.data.media import decode
from finetune.data.sample import Medium, Message

ANSWER_SECONDS = 600.0
STOP_SECONDS = 20.0
SAID_LINES = 8  # of a log, in an error


@dataclass(frozen=True)
class Server:
    """`engine`: its name, for errors. `url`: its base. `log`: what it has said so far."""

    engine: str
    url: str
    log: IO[bytes]

    def said(self) -> str:
        """What matters of the log: its errors, else its end."""
        self.log.seek(0)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read().decode(errors="replace")).splitlines()
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: |\berror\b| E ", line)]
        return "\n".join(dict.fromkeys((errors or lines)[-SAID_LINES:]))


@contextmanager
def serving(
    engine: str, command: Sequence[str], start_seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """What `command` serves on a free port of this machine, until the block ends; it takes `--host` and `--port`.

    Raises ExportRefused where it doesn't answer in time, with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        # A group of its own: an engine's workers are processes too, and none may outlive this.
        process = subprocess.Popen(
            [*command, *where],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=scratch,
            env=environment,
            start_new_session=True,
        )
        try:
            server = Server(engine, f"http://127.0.0.1:{port}", log)
            _wait(process, server, start_seconds)
            yield server
        finally:
            _stop(process)


def ask(server: Server, messages: Sequence[Message], max_new_tokens: int, **more: Any) -> dict[str, Any]:
    """The choice that is answered, greedily; `more` goes along with the request. Raises ExportRefused."""
    body = {
        "messages": [{"role": message.role, "content": content_of(message)} for message in messages],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        **more,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:400]
        raise ExportRefused(f"{server.engine} doesn't answer a question: {told}\n{server.said()}") from None
    except (OSError, ValueError, LookupError) as error:
        raise ExportRefused(f"{server.engine} doesn't answer a question: {error}\n{server.said()}") from None


def content_of(message: Message) -> list[dict[str, Any]]:
    """A turn's parts as OpenAI's API has them; text that follows text is one, as some engines would break the line
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

    from finetune.data.media.audio import RATE

    decoded, file = decode(medium.kind, medium.path), io.BytesIO()
    if medium.kind == "image":
        decoded.save(file, "PNG")
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(file)}"}}
    soundfile.write(file, decoded, RATE, format="WAV", subtype="FLOAT")
    return {"type": "input_audio", "input_audio": {"data": _base64(file), "format": "wav"}}


def _base64(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()


def _wait(process: "subprocess.Popen[bytes]", server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ExportRefused(f"{server.engine} stopped with status {process.returncode}:\n{server.said()}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise ExportRefused(
        f"{server.engine} hasn't started within {seconds:g} s (`--option start_seconds=...` gives it more):\n"
        + server.said()
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """The second round is for workers that outlive what started them."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
