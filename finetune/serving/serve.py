"""Serve models over HTTP until a signal ends the process."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.common.errors import RecipeError, option
from finetune.common.registry import parse_options
from finetune.common.run_folder import RunFolder, RunLike
from finetune.serving.http.settings import ServerOptions

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from finetune.serving.engine.engine import BatchingEngine

LOCALHOST = "127.0.0.1"
INSTALL = "serving needs FastAPI and uvicorn: pip install 'finetune-kit[serve]'"
FLUSH_SECONDS = 5  # for the ends of answers to be sent


def serve(
    models: RunLike | Sequence[RunLike],
    *,
    host: str = LOCALHOST,
    port: int = 8000,
    api_key: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Serve one or several `models`, each a run or `[NAME=]RUN|FOLDER|HUB_ID`, at http://HOST:PORT until SIGINT or
    SIGTERM. Running requests then have `drain_seconds` to finish; a second signal ends the process at once. The default
    name of a run is that of its folder. `port` 0: any free port. `options`: `key=value` of
    `finetune.serving.http.settings.ServerOptions`.

    To be called in the main thread. Raises RecipeError for an address other than 127.0.0.1 without an API key, an
    address in use, and invalid options or names; ArtifactError or ModelError for models that can't be loaded.
    """
    server_options = parse_options(options, ServerOptions)
    if host != LOCALHOST and not api_key:
        raise RecipeError(
            f"{option('--host', 'host')} {host} opens the server to other machines: set "
            f"{option('--api-key', 'api_key=')} or FINETUNE_API_KEY, or leave out {option('--host', 'host=')}"
        )
    several = [models] if isinstance(models, RunFolder | os.PathLike | str) else models
    sources = parse_models([os.fspath(model) for model in several])
    _check_installed()
    with listening_socket(host, port) as listener:  # before the models, which may take minutes to load
        run_server(load_engine(sources, server_options), server_options, listener, api_key or None)


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """{name: run, folder or Hub id}. Raises RecipeError."""
    sources: dict[str, str] = {}
    for model in models:
        name, equals, source = model.partition("=")
        if not equals or Path(model).exists():
            path = Path(model).resolve()
            run = path.parent if path.name in ("merged", "adapter") else path
            name, source = (run.name if path.exists() else model), model
        if not name or not source:
            raise RecipeError(f"{model}: write NAME=RUN, a run, a folder or a Hub id")
        if name in sources:
            raise RecipeError(
                f"{model}: {sources[name]} has the name {name!r} already; put another name before it, NAME={source}"
            )
        sources[name] = source
    return sources


def load_engine(sources: Mapping[str, str], options: ServerOptions) -> "BatchingEngine":
    """An engine for the models. The tighter of the server's and a model's own limits on media hold."""
    from finetune.serving.engine.engine import BatchingEngine
    from finetune.serving.engine.models import load_models

    assistants = load_models(sources)
    for assistant in assistants.values():
        assistant.limits = options.media_limits(assistant.limits)
    return BatchingEngine(assistants, options)


def run_server(
    engine: "BatchingEngine", options: ServerOptions, listener: socket.socket, api_key: str | None = None
) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="finetune-serve-", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # for the media of requests
        with stop_on_signals(folder) as stop:
            serve_until(stop, engine, options, listener, folder, api_key)


def serve_until(
    stop: threading.Event,
    engine: "BatchingEngine",
    options: ServerOptions,
    listener: socket.socket,
    folder: Path,
    api_key: str | None = None,
) -> None:
    """Start the engine and serve until `stop` is set, then drain."""
    from finetune.serving.http.app import build_app

    app = build_app(engine, options, folder, api_key)
    server = uvicorn_server(app, options)
    # In another thread than the main one uvicorn leaves signals alone; it would close connections before the answers
    # are complete.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    engine.start()
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.02)
    print(f"{address(listener)}  {', '.join(engine.models)}", file=sys.stderr, flush=True)
    while thread.is_alive() and not stop.wait(0.5):
        pass
    app.state.server.draining = True
    engine.stop(options.drain_seconds)
    server.should_exit = True
    thread.join()


def uvicorn_server(app: "FastAPI", options: ServerOptions) -> "uvicorn.Server":
    import uvicorn

    from finetune.serving.http.connection import protocol_with_timeout

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=protocol_with_timeout(options.body_seconds),
            limit_concurrency=options.max_connections,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
    )


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal deletes the folder and ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + number)
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address; connections are refused until the server listens. Raises RecipeError."""
    if not 0 <= port < 2**16:
        raise RecipeError(f"{option('--port', 'port')} {port}: write 1 to {2**16 - 1}, or 0 for any free port")
    where = option(f"--host {host} --port {port}", f"host {host}, port {port}")
    try:
        family, kind, protocol, _, bind_address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RecipeError(f"{where}: no such address ({error})") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(bind_address)
        except OSError as error:
            raise RecipeError(f"{where}: not available ({error}); choose another {option('--port', 'port=')}") from None
        yield listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise RecipeError(INSTALL) from None
