"""Serve: models over HTTP, until a signal ends it."""

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.common.errors import RecipeError
from finetune.serving.engine.contract import Engine
from finetune.serving.http.settings import Options, options_of

LOCAL = "127.0.0.1"
INSTALL = "serving needs FastAPI and uvicorn: pip install 'finetune[serve]'"
FLUSH_SECONDS = 5  # for the ends of answers to reach their readers


def serve(
    models: Sequence[str],
    *,
    host: str = LOCAL,
    port: int = 8000,
    api_key: str | None = None,
    options: Sequence[str] = (),
) -> None:
    """Serve each of `models`, `[NAME=]RUN|FOLDER|HUB_ID`, at http://HOST:PORT until SIGINT or SIGTERM: running requests
    then have `drain_seconds` to end, and a second signal ends at once. A run is called by its folder's name where it
    has no other. `port` 0: any free one. `options`: `key=value`, of `finetune.serving.http.settings.Options`.

    To be called in the main thread. Raises RecipeError for an address other than 127.0.0.1 without an API key, one that
    is in use, and options or names that can't be; ArtifactError or ModelError for models that can't be loaded.
    """
    bounds = options_of(options)
    if host != LOCAL and not api_key:
        raise RecipeError(
            f"--host {host}: others could ask there: give --api-key or FINETUNE_API_KEY, or leave out --host"
        )
    places = named(models)
    _installed()
    with bound(host, port) as listener:  # before minutes go by with loading
        engine = loaded(places, bounds)
        run_server(engine, bounds, listener, api_key or None)


def named(models: Sequence[str]) -> dict[str, str]:
    """{name: run, folder or Hub id}. Raises RecipeError."""
    found: dict[str, str] = {}
    for one in models:
        name, equals, place = one.partition("=")
        if not equals or Path(one).exists():
            path = Path(one).resolve()
            whose = path.parent if path.name in ("merged", "adapter") else path
            name, place = (whose.name if path.exists() else one), one
        if not name or not place:
            raise RecipeError(f"{one}: write NAME=RUN, a run, a folder or a Hub id")
        if name in found:
            raise RecipeError(f"{one}: {name!r} is {found[name]} already; write another name before it, NAME={place}")
        found[name] = place
    return found


def loaded(places: dict[str, str], bounds: Options) -> Any:
    """An Engine over the models. What media may be is the tighter of the model's bounds and ours."""
    from finetune.common.progress import quiet_libraries
    from finetune.recipe.schema import Limits
    from finetune.serving.engine.engine import Engine as Batching
    from finetune.serving.engine.models import load_models

    quiet_libraries()
    assistants = load_models(places)
    for assistant in assistants.values():
        its = assistant.limits
        assistant.limits = Limits(
            **{name: min(getattr(its, name), getattr(bounds, name)) for name in Limits.model_fields}
        )
    return Batching(
        assistants,
        paths=places,
        max_batch=bounds.max_batch,
        max_batch_tokens=bounds.max_batch_tokens,
        queue_limit=bounds.queue_limit,
        media_cache_bytes=bounds.media_cache_bytes,
        prefix_cache_bytes=bounds.prefix_cache_bytes,
        media_waiting_bytes=bounds.media_waiting_bytes,
    )


def run_server(engine: Engine, bounds: Options, listener: socket.socket, api_key: str | None = None) -> None:
    """Answer on a bound socket until a signal comes."""
    import uvicorn

    from finetune.serving.http.app import build_app
    from finetune.serving.http.connection import patient_for

    folder = Path(tempfile.mkdtemp(prefix="finetune-serve-"))
    try:
        app = build_app(engine, bounds, folder, api_key)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=patient_for(bounds.body_seconds),
            limit_concurrency=bounds.max_connections,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        server = uvicorn.Server(config)
        # In a thread of its own uvicorn leaves signals alone: it would close the door before what runs has ended.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
        with signals(folder) as told:
            engine.start()
            thread.start()
            while thread.is_alive() and not server.started:
                thread.join(0.02)
            _say(f"{address(listener)}  {', '.join(engine.models)}")
            while thread.is_alive() and not told.wait(0.5):
                pass
            app.state.server.draining = True
            engine.stop(bounds.drain_seconds)
            server.should_exit = True
            thread.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def signals(folder: Path) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second one ends the process, whatever it does."""
    told = threading.Event()

    def handle(number: int, _: Any) -> None:
        if told.is_set():
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + number)
        told.set()

    before = {one: signal.signal(one, handle) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address; who connects is refused until the server listens. Raises RecipeError."""
    if not 0 <= port < 2**16:
        raise RecipeError(f"--port {port}: write 1 to {2**16 - 1}, or 0 for any free one")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RecipeError(f"--host {host} --port {port}: no such address ({error})") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
        except OSError as error:
            raise RecipeError(f"--host {host} --port {port}: can't be had ({error}); choose another --port") from None
        yield listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def _installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise RecipeError(INSTALL) from None
