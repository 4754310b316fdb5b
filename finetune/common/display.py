"""How results show themselves in a notebook: HTML that needs no other file. Texts are escaped here."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

PIXELS = 150 / 96  # of a plot to a CSS pixel, of which an inch has 96


def heading(text: str) -> str:
    return f"<h4>{escape(text)}</h4>"


def line(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    return f'<pre style="white-space: pre-wrap; word-break: normal">{escape(text)}</pre>'


def table(header: Sequence[str], rows: Sequence[Sequence[object]], left: bool = False) -> str:
    """`left`: cells begin at the left, as texts should; notebooks put them to the right."""
    style = ' style="text-align: left"' if left else ""
    cells = "".join(f"<th{style}>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td{style}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def files(paths: Mapping[str, Path]) -> str:
    """Names and paths of those that exist."""
    return table(("", "path"), [(name, path) for name, path in paths.items() if path.exists()], left=True)


def picture(path: Path) -> str:
    """A PNG, inline, as large as it was drawn at 150 pixels an inch; nothing where there is none."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    width = round(int.from_bytes(content[16:20], "big") / PIXELS)
    style = f"width: {width}px; max-width: 100%"
    return f'<img alt="{escape(path.stem)}" style="{style}" src="{data_uri("image/png", content)}">'


def data_uri(kind: str, content: bytes) -> str:
    """`kind`: of the content, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def page(content: str) -> str:
    """A whole HTML page in a frame of its own: its style and script stay in there."""
    return f'<iframe srcdoc="{escape(content)}" sandbox="allow-scripts" width="100%" height="640"></iframe>'
