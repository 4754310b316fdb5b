"""Access control: an API key if there is one; otherwise only this machine, and no pages of other sites."""

import hmac
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.serving.http.protocol import ApiError

WITHOUT_KEY = ("/", "/health")  # the page itself asks for the key
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class AccessControl:
    """ASGI middleware in front of every endpoint; it decides before any of the body has been read."""

    def __init__(self, app: ASGIApp, api_key: str | None, origins: Sequence[str] = ()) -> None:
        self.app, self.origins = app, origins
        self.expected = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(reversed(scope["headers"]))
            if error := self.refusal(scope["path"], headers):
                await JSONResponse(error.content(), error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def refusal(self, path: str, headers: Mapping[bytes, bytes]) -> ApiError | None:
        if self.expected is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            valid = hmac.compare_digest(key.strip(), self.expected) and scheme.lower() == b"bearer"
            if not valid and path not in WITHOUT_KEY:
                return ApiError(401, "send the server's key: Authorization: Bearer KEY", code="invalid_api_key")
            return None
        host = headers.get(b"host", b"").decode("latin-1")
        if _hostname(host) not in THIS_MACHINE:  # the owner of another name can let it resolve to this machine
            return ApiError(403, f"without an API key only {', '.join(THIS_MACHINE)} are served, not {host[:100]!r}")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.origins and origin != f"http://{host}":
            return ApiError(403, f"pages of {origin[:100]!r} may not use this server; `origins` can allow it")
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
