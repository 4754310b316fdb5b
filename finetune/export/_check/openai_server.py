"""An engine's OpenAI-compatible server in a process group of its own: started, queried, and stopped for certain."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import httpx2

from finetune.common.errors import ExportRefused
from finetune.data.sample import Message

ANSWER_SECONDS = 600.0
STOP_SECONDS = 20.0
LOG_LINES = 8  # quoted in an error
ATTENDED = Path(__file__).with_name("attended.py")


@dataclass(frozen=True)
class Server:
    """`engine`: its name, for errors. `url`: without path. `log`: its output so far."""

    engine: str
    url: str
    log: IO[bytes]

    def log_excerpt(self) -> str:
        """The last lines that report errors, or the last lines."""
        self.log.seek(0)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read().decode(errors="replace")).splitlines()
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: |\berror\b| E ", line)]
        return "\n".join(dict.fromkeys((errors or lines)[-LOG_LINES:]))


@contextmanager
def serving(
    engine: str,
    command: Sequence[str],
    start_seconds: float,
    environment: Mapping[str, str] | None = None,
    log_file: Path | None = None,
) -> Iterator[Server]:
    """Run `command`, which accepts `--host` and `--port`, on a free port of this machine until the block ends, or this
    process does. `log_file`: where its output is kept, behind what is there.

    Raises ExportRefused with an excerpt of its log if it isn't ready in time.
    """
    attended = [sys.executable, "-I", str(ATTENDED), str(os.getpid())]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory() as scratch,
        log_file.open("a+b") if log_file else tempfile.TemporaryFile() as log,
    ):
        # A group of its own: an engine's workers are processes too, and none may outlive this.
        process = subprocess.Popen(
            [*attended, *command, "--host", "127.0.0.1", "--port", str(port)],
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


def answer_ids(
    server: Server,
    messages: Sequence[Message],
    max_new_tokens: int,
    read: Callable[[Any], list[int]],
    **fields: Any,
) -> list[int]:
    """Token ids of a greedy chat completion, which `read` takes from the response; `fields` are added to the request.

    Raises ExportRefused.
    """
    body = {
        "messages": [{"role": message.role, "content": content_of(message)} for message in messages],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        **fields,
    }
    try:
        response = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS, trust_env=False)
        response.raise_for_status()
        return read(response.json())
    except (httpx2.HTTPError, ValueError, LookupError) as error:
        reason = error.response.text[:400] if isinstance(error, httpx2.HTTPStatusError) else repr(error)
        raise ExportRefused(f"{server.engine} doesn't answer a question: {reason}\n{server.log_excerpt()}") from None


def content_of(message: Message) -> list[dict[str, object]]:
    """A turn in the form of OpenAI's API, its media inline. Adjacent texts are joined: some engines would separate them
    by a line break.
    """
    parts: list[dict[str, object]] = []
    for kind, adjacent in groupby(filter(None, message.content), type):
        if kind is str:
            parts.append({"type": "text", "text": "".join(map(str, adjacent))})
        else:
            parts.extend(map(_media_part, adjacent))
    return parts


def _media_part(medium: Any) -> dict[str, object]:
    encoded = base64.b64encode(medium.path.read_bytes()).decode()
    if medium.kind == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


def _wait(process: "subprocess.Popen[bytes]", server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ExportRefused(f"{server.engine} stopped with status {process.returncode}:\n{server.log_excerpt()}")
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{server.url}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise ExportRefused(
        f"{server.engine} hasn't started within {seconds:g} s (the option `start_seconds` allows more):\n"
        + server.log_excerpt()
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, then SIGKILL for workers that outlive the process which started them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
