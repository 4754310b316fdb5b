"""Against a server on loopback, which counts what it is asked."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from finetune.common.errors import DataError, MediaError
from finetune.data import _connection, fetch
from finetune.data.fetch import fetched

ASKED: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ASKED.append(self.path)
        name = self.path.partition("?")[0]
        if name == "/circle":
            return self.answer(302, b"", Location=name)
        if name == "/moved":
            return self.answer(302, b"", Location=self.path.partition("?")[2])
        if name == "/slow":
            time.sleep(1)
        if name == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 2**16)
            except OSError:
                return None
        if name == "/broken":
            return self.answer(200, b"half", **{"Content-Length": "8"})
        return self.answer(*((404, b"no") if name == "/none" else (200, f"content of {self.path}".encode())))

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # who asks hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ASKED.clear()
    return tmp_path / "cache"


def get(address, hosts=("127.0.0.1",), max_bytes=1000):
    return fetched(address, hosts, "rows.csv:2", max_bytes)


def test_an_address_is_asked_once(port, cache):
    address = f"http://127.0.0.1:{port}/a b/红.png?q=1&r=%20"
    path = get(address)
    expected = "/a%20b/%E7%BA%A2.png?q=1&r=%20"
    assert path.read_bytes() == f"content of {expected}".encode() and path.is_relative_to(cache)
    assert get(address) == path
    assert [expected] == ASKED
    path.unlink()
    assert get(address) == path and len(ASKED) == 2


def test_a_host_must_be_named_even_for_what_is_cached(port):
    address = f"http://127.0.0.1:{port}/a"
    get(address)
    for hosts in ((), ("localhost",), ("127.0.0.1.example.com",), ("*.0.0.1",)):
        with pytest.raises(DataError, match=r"rows.csv:2: .*(of a host that `hosts` doesn't name|leads to 127)"):
            get(f"http://127.0.0.1:{port}/other", hosts)
    with pytest.raises(DataError, match=r"add '127.0.0.1'"):
        get(address, ())
    assert ASKED == ["/a"]


@pytest.mark.parametrize(
    "address",
    ["ftp://127.0.0.1/a", "file:///etc/hostname", "http://", "http://[::1", "http://127.0.0.1:x/a", "gopher://a"],
)
def test_other_addresses_are_refused(address):
    with pytest.raises(DataError, match=r"not of http or https|is no address"):
        get(address)


@pytest.mark.parametrize("target", ["http://localhost:{}/a", "http://user@169.254.169.254/a", "file:///etc/hostname"])
def test_each_redirect_must_lead_to_a_named_host(target, port):
    with pytest.raises(DataError, match=r"`hosts` doesn't name|not of http"):
        get(f"http://127.0.0.1:{port}/moved?{target.format(port)}")
    assert len(ASKED) == 1
    assert get(f"http://127.0.0.1:{port}/moved?/here").read_bytes() == b"content of /here"


def test_redirects_end(port):
    with pytest.raises(DataError, match="more than 5 redirects"):
        get(f"http://127.0.0.1:{port}/circle")


@pytest.fixture
def resolved(monkeypatch):
    """As if every name were resolved to these addresses, in turn; the names that were asked for."""
    real, names, answers = socket.getaddrinfo, [], []

    def resolve(host, *rest, **more):
        if not host.replace(".", "").isdigit():  # a name, not an address
            names.append(host)
            host = answers[min(len(names), len(answers)) - 1]
        return [found for address in host.split() for found in real(address, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names, answers


def test_a_pattern_never_leads_into_a_private_network(port, resolved, monkeypatch):
    """As if the name of a public host were made to lead here: it isn't even connected to."""
    _, answers = resolved
    connections = []
    real = socket.create_connection
    monkeypatch.setattr(
        socket,
        "create_connection",
        lambda place, *rest, **more: connections.append(place) or real(place, *rest, **more),
    )
    address = f"http://media.example.com:{port}/a"
    for answer in ("127.0.0.1", "8.8.8.8 127.0.0.1", "169.254.169.254", "10.0.0.1", "::ffff:127.0.0.1"):
        answers[:] = [answer]
        with pytest.raises(DataError, match=r"leads to [\da-f.:]+, in a private network; name the host"):
            get(address, ("*.example.com",))
    assert not ASKED and not connections
    answers[:] = ["127.0.0.1"]
    assert get(address, ("Media.Example.com",)).read_bytes() == b"content of /a"
    assert connections == [("127.0.0.1", port)]


def test_a_name_is_resolved_once(port, resolved, monkeypatch):
    """A name that changes its mind after the check leads nowhere else: the connection is to the checked address."""
    names, answers = resolved
    answers[:] = ["8.8.8.8", "127.0.0.1"]
    connections = []

    def refuse(place, *_, **__):
        connections.append(place)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(DataError, match=r"can't be fetched .*refused"):
        get(f"http://media.example.com:{port}/a", ("*.example.com",))
    assert connections == [("8.8.8.8", port)] and names == ["media.example.com"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none", DataError, "404"),
        ("endless", MediaError, "more than 1,000 bytes"),
        ("broken", DataError, "can't be fetched|broke off"),
        ("slow", DataError, "can't be fetched .*timed out"),
    ],
)
def test_what_goes_wrong_is_a_data_error_and_nothing_is_kept(name, error, message, port, cache, monkeypatch):
    monkeypatch.setattr(_connection, "SECONDS", 0.3)
    with pytest.raises(error, match=rf"^rows\.csv:2: http.*{message}"):
        get(f"http://127.0.0.1:{port}/{name}")
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_a_download_that_trickles_ends(port, monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS_IN_ALL", 0.0)
    with pytest.raises(DataError, match="not complete after 0 s"):
        get(f"http://127.0.0.1:{port}/endless", max_bytes=10**9)


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 OK\r\nX-",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_whatever_trickles_has_its_time(beginning):
    """A byte now and then never lets the connection's own timeout come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            opened, _ = listener.accept()
            with opened, contextlib.suppress(OSError):
                opened.recv(10_000)
                opened.sendall(beginning)
                for _ in range(100):
                    time.sleep(0.05)
                    opened.sendall(b"0")

        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"^row 1: http.*: not complete after 0\.4 s$"):
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/a"
            fetch.content_at(address, ["127.0.0.1"], "row 1", 1000, seconds=0.4)
        assert time.monotonic() - begin < 2
        thread.join()


def test_nobody_there():
    with pytest.raises(DataError, match="can't be fetched"):
        get("http://127.0.0.1:1/a")
