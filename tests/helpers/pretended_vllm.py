"""A program that pretends to be the python of vLLM's environment: its server answers with given tokens."""

import json
import os
import sys
import time
from pathlib import Path
from textwrap import dedent

PROGRAM = """
    import http.server, json, os, subprocess, sys
    if sys.argv[1] == "-c":
        print(json.dumps(["9.9", []]))
        sys.exit()
    folder, fails_after = {folder!r}, {fails_after}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's workers
    open(folder + "/pids", "a").write(f"{{os.getpid()}} {{child.pid}}\\n")
    open(folder + "/command", "w").write(json.dumps(sys.argv))
    print("INFO: it begins", flush=True)
    if fails_after is None:
        print("ValueError: no such thing as this model", flush=True)
        sys.exit(3)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200), self.end_headers()

        def do_POST(self):
            key = os.environ.get("VLLM_API_KEY")
            if key and self.headers["Authorization"] != "Bearer " + key:
                self.send_response(401), self.end_headers()
                return
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with open(folder + "/requests", "a") as file:
                file.write(json.dumps([self.path, request]) + "\\n")
            asked = sum("completions" in line[:30] for line in open(folder + "/requests"))
            if asked > fails_after:
                print("RuntimeError: out of luck", flush=True)
                os._exit(1)
            choices = [
                dict(index=n, token_ids=[300 + n + asked % 3, 301], logprobs=dict(token_logprobs=[-5.5, -6.0 - n]))
                for n in range(request.get("n", 0))
            ]
            if "/chat/" in self.path:
                choices = [dict(token_ids=[5, 6, 2], message=dict(content="ab"))]
            self.send_response(200), self.end_headers()
            self.wfile.write(json.dumps(dict(choices=choices[::-1])).encode())

        def log_message(self, *args):
            pass

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class PretendedVllm:
    """`fails_after`: completions until it dies; None: it doesn't even start."""

    def __init__(self, folder: Path, fails_after: int | None = 10**6) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.python = folder, folder / "python"
        text = dedent(PROGRAM).format(folder=str(folder), fails_after=fails_after)
        self.python.write_text(f"#!{sys.executable}\n{text}")
        self.python.chmod(0o755)

    @property
    def command(self) -> list[str]:
        return json.loads((self.folder / "command").read_text())

    @property
    def requests(self) -> list[tuple[str, dict]]:
        return [tuple(json.loads(line)) for line in (self.folder / "requests").read_text().splitlines()]

    @property
    def pids(self) -> list[int]:
        """Of its servers and their workers."""
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]


def gone(pid: int) -> bool:
    """Within seconds: a signal takes its time."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False
