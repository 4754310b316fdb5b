"""Addresses of media that a request or a row may hold: those of private networks, of other protocols and of hosts that
nobody named are refused before anything is connected to. A listener on every address of this machine counts.
"""

import http.server
import re
import selectors
import socket
import threading
from contextlib import contextmanager

import pytest
from fake_engine import FakeEngine, call, served
from real_server import CHAT

from finetune.common.errors import DataError
from finetune.data.fetch import content_at

pytestmark = pytest.mark.slow
# Names, as a hostile owner's DNS would answer for them.
NAMES = {
    "private.example.com": ["10.0.0.1"],
    "here.example.com": ["127.0.0.1"],
    "both.example.com": ["8.8.8.8", "127.0.0.1"],
    "metadata.example.com": ["169.254.169.254"],
    "mapped.example.com": ["::ffff:127.0.0.1"],
    "nat64.example.com": ["64:ff9b::7f00:1"],
    "6to4.example.com": ["2002:7f00:1::"],
    "compatible.example.com": ["::127.0.0.1"],
    "site.example.com": ["fec0::1"],
    "many.example.com": ["224.0.0.1"],
    "shared.example.com": ["100.64.0.1"],
    "local.example.com": ["fe80::1%lo"],
}
NAMED = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "0x7f.1", "0177.0.0.1", "2130706433", "*.example.com")
HERE = ("127.0.0.1", "[::1]", "0.0.0.0", "[::]", "0x7f.1", "0177.0.0.1", "2130706433", "127.1")
ADDRESSES = [
    *(f"http://{name}:PORT/a.png" for name in (*NAMES, *HERE, "localhost")),
    "HTTPS://LOCALHOST:PORT/a.png",
    "http://[::ffff:127.0.0.1]:PORT/a.png",
    "http://user:secret@127.0.0.1:PORT/a.png",
    "http://media.example.com@127.0.0.1:PORT/a.png",
    "http://127.0.0.1:PORT#@media.example.org/a.png",
    "http://127.0.0.1:PORT\\@media.example.org/a.png",
    "http://１２７.0.0.1:PORT/a.png",
    "http://localhost.:PORT/a.png",
    "//127.0.0.1:PORT/a.png",
    "ftp://127.0.0.1:PORT/a.png",
    "gopher://127.0.0.1:PORT/_GET%20/",
    "file:///etc/hostname",
    "file://127.0.0.1:PORT/etc/hostname",
    "http://127.0.0.1:PORT\r\nHost: x/a.png",
    "/etc/hostname",
]
REFUSED = re.compile("private network|`hosts` doesn't name|not of http|is no address|write a data URI")


@contextmanager
def listening():
    """(port, connections) of a listener at 0.0.0.0 and ::, to which nobody should come."""
    connections, ended = [], threading.Event()
    with (
        socket.create_server(("", 0)) as four,
        socket.socket(socket.AF_INET6) as six,
        selectors.DefaultSelector() as ready,
    ):
        port = four.getsockname()[1]
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::", port))
        six.listen()
        for one in (four, six):
            ready.register(one, selectors.EVENT_READ)

        def accept():
            while not ended.is_set():
                for key, _ in ready.select(0.05):
                    connection, peer = key.fileobj.accept()
                    connections.append(peer)
                    connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield port, connections
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def names(monkeypatch):
    """DNS by NAMES; the names that were asked for."""
    real, asked = socket.getaddrinfo, []

    def resolve(host, *rest, **more):
        asked.append(host)
        answers = NAMES.get(host, [host])
        return [found for one in answers for found in real(one, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_request_connects_to_no_private_address(names, tried, tmp_path):
    with listening() as (port, connections), served(FakeEngine(), tmp_path, hosts=NAMED) as (address, _):
        for url in ADDRESSES:
            part = {"type": "image_url", "image_url": {"url": url.replace("PORT", str(port))}}
            body = {"model": "shelf", "messages": [{"role": "user", "content": [part]}]}
            status, _, answer = call(address, CHAT, body)
            message = answer["error"]["message"]
            assert status == 400 and message.startswith("messages[0].content[0]: ") and REFUSED.search(message), url
        assert not connections
        socket.create_connection(("127.0.0.1", port)).close()  # the listener does count
        socket.create_connection(("::1", port)).close()
    assert len(connections) == 2
    tried(f"{len(ADDRESSES)} hostile addresses in requests, their hosts allowed", "refused; no connection")


def moved_to(target):
    """A server that sends everybody on to `target`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    return server


def test_a_row_s_address_is_followed_to_no_private_one(names, tried):
    """A recipe names `localhost`, and may; where that sends on to, was named by nobody."""
    targets = [
        url
        for url in ADDRESSES
        if url.isascii() and url.isprintable() and "localhost" not in url.lower() and ":" in url
    ]
    with listening() as (port, connections):
        for url in targets:
            with moved_to(url.replace("PORT", str(port))) as server, pytest.raises(DataError, match=REFUSED):
                address = f"http://localhost:{server.server_address[1]}/a.png"
                content_at(address, ["localhost", "*.example.com"], "rows.csv:2", 1000)
        assert not connections
    tried(f"redirects to {len(targets)} hostile addresses", "refused; no connection")


def test_a_name_that_is_resolved_anew_leads_nowhere(monkeypatch, tried):
    """DNS rebinding: public when it is checked, this machine ever after. What is connected to is what was checked."""
    real, answers, places = socket.getaddrinfo, iter(["8.8.8.8"]), []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: real(next(answers, "127.0.0.1"), *rest, **more)
    )

    def refuse(place, *_, **__):
        places.append(place)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with listening() as (port, connections):
        with pytest.raises(DataError, match="refused"):
            content_at(f"http://media.example.com:{port}/a", ["*.example.com"], "row 1", 1000)
        assert places == [("8.8.8.8", port)] and not connections
    tried("a name that is public when it is checked and this machine afterwards", "no connection")
