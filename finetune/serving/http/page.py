"""The chat page: one file, which may run its own script and ask this server, and nothing else."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> tuple[str, dict[str, str]]:
    """(HTML, headers)."""
    html = files("finetune.serving.http").joinpath("page.html").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest('script', html)}",
            f"style-src {_digest('style', html)}",
            "img-src data: blob:",
            "media-src data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "microphone=(self)",
        "Cache-Control": "no-cache",
    }


def _digest(tag: str, html: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
