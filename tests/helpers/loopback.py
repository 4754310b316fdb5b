"""This process, asking a Hub on loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_server import TOKEN, Hub


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@contextmanager
def asked_of(hub: Hub, monkeypatch: Any, cache: Path, token: str | None = TOKEN) -> Iterator[Hub]:
    """huggingface_hub, in this process, asks this Hub: what HF_ENDPOINT and the like would do before it is imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between attempts
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "" if token else "1")
    _http.close_session()
    yield hub
    _http.close_session()
