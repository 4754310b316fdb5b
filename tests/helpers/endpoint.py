"""An OpenAI-compatible endpoint on loopback that answers by a script, also with what an endpoint shouldn't."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(text: str, **choice: Any) -> dict[str, Any]:
    """The body of an answer in words."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "seer-2",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice],
    }


class ScriptedEndpoint:
    """`script(body)`: what a request is answered with: the body of an answer, or (status, headers, bytes)."""

    def __init__(self, script: Callable[[dict[str, Any]], Any]) -> None:
        self.script, self.bodies, self.keys, self.models = script, [], [], ["seer"]
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def respond(self, body: dict[str, Any] | None, key: str) -> tuple[int, dict[str, str], bytes]:
        if body is None:
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": ""} for name in self.models]
            return 200, {}, json.dumps({"object": "list", "data": listed}).encode()
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        said = self.script(body)
        with self.lock:
            self.at_once -= 1
        return said if isinstance(said, tuple) else (200, {}, json.dumps(said).encode())


@contextmanager
def endpoint(script: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, ScriptedEndpoint]]:
    """(address, endpoint) of one that runs."""
    scripted = ScriptedEndpoint(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(None)

        def do_POST(self) -> None:
            self.send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def send(self, body: dict[str, Any] | None) -> None:
            status, headers, content = scripted.respond(body, self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", scripted
    finally:
        server.shutdown()
        server.server_close()


def media_in(body: dict[str, Any]) -> list[tuple[str, bytes]]:
    """(type, content) of each medium of a request."""
    found = []
    for part in body["messages"][-1]["content"]:
        if part["type"] in ("image_url", "video_url"):
            found.append((part["type"], base64.b64decode(part[part["type"]]["url"].partition(",")[2])))
        elif part["type"] == "input_audio":
            found.append(("input_audio", base64.b64decode(part["input_audio"]["data"])))
    return found


def text_in(body: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in body["messages"][-1]["content"])
