"""Who may ask: a key where there is one, otherwise only this machine, and no other site's page in its browser."""

import hmac
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from finetune.serving.http.protocol import ApiError

OPEN = ("/", "/health")  # the page asks for the key itself
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class Gate:
    """ASGI middleware, in front of every endpoint; nothing of a request's body is read before it has passed."""

    def __init__(self, app: Any, api_key: str | None, origins: Sequence[str] = ()) -> None:
        self.app, self.origins = app, origins
        self.expected = api_key.encode() if api_key else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(reversed(scope["headers"]))
            if wrong := self.refusal(scope["path"], headers):
                return await JSONResponse(wrong.content(), wrong.status, wrong.headers)(scope, receive, send)
        return await self.app(scope, receive, send)

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.expected is not None:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            fits = hmac.compare_digest(key.strip(), self.expected) and kind.lower() == b"bearer"
            if not fits and path not in OPEN:
                return ApiError(401, "send the server's key: Authorization: Bearer KEY", code="invalid_api_key")
            return None
        host = headers.get(b"host", b"").decode("latin-1")
        if _name(f"//{host}") not in THIS_MACHINE:  # another name may be made to lead here by who owns it
            return ApiError(403, f"without an API key only {', '.join(THIS_MACHINE)} are served, not {host[:100]!r}")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.origins and origin != f"http://{host}":
            return ApiError(403, f"pages of {origin[:100]!r} may not ask here (`origins` would allow it)")
        return None


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
