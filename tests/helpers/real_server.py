"""A server as `finetune serve` runs it, in a process of its own, and clients with real sockets."""

import base64
import http.client
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from finetune.serving.engine.contract import Request
from finetune.serving.engine.engine import BatchingEngine
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import listening_socket, run_server

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Running:
    """`log`: all that the process has written, at the most talkative level."""

    port: int
    process: BaseProcess
    log: Path | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def server(assistant: Any, *, log: Path | None = None, api_key: str | None = None, **options: Any) -> Iterator[Running]:
    """`assistant`, as 'tiny'."""
    with listening_socket("127.0.0.1", 0) as listener:
        settings = ServerOptions(**{"queue_limit": 16, "timeout_seconds": 60, "drain_seconds": 5, **options})
        engine = BatchingEngine({"tiny": assistant}, settings)

        def run() -> None:
            with ExitStack() as stack:
                if log:
                    file = stack.enter_context(log.open("w", buffering=1))
                    stack.enter_context(redirect_stdout(file))
                    stack.enter_context(redirect_stderr(file))
                    logging.basicConfig(level=logging.DEBUG, force=True)
                run_server(engine, settings, listener, api_key)

        process = get_context("fork").Process(target=run, daemon=True)
        process.start()
        running = Running(listener.getsockname()[1], process, log)
    try:
        wait_for(lambda: get(running.port, "/health"))
        yield running
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    assert condition()


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def gauge(port: int, name: str) -> float:
    lines = get(port, "/metrics").splitlines()
    return next(float(line.split()[-1]) for line in lines if line.split(" ")[0].endswith(name))


def idle(port: int) -> bool:
    """Whether nothing waits and nothing runs."""
    return gauge(port, "requests_waiting") == gauge(port, "requests_running") == 0


def body_of(wanted: Request, **more: object) -> str:
    """A request's JSON, with its pictures as data URIs."""
    parts: list[dict[str, Any]] = []
    for part in wanted.messages[0].content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            encoded = base64.b64encode(part.path.read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
    messages = [{"role": "user", "content": parts}]
    return json.dumps(
        {"model": "tiny", "messages": messages, "max_tokens": wanted.max_new_tokens, "temperature": 0, **more}
    )


def head_of(body: str | bytes, path: str = CHAT) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()


def opened(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(sent)
    return connection


def open_files(process: BaseProcess) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def resident_bytes(process: BaseProcess) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
