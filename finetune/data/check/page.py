"""Self-contained HTML about rows: styles, script, thumbnails and sound inside one file, nothing fetched."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.data.check.ledger import CODES, Finding, Ledger
from finetune.data.media import Limits, decode

SHOWN = 24  # findings of a kind on the page; all are in check.json
EXAMPLES = 6  # rows with nothing to find fault with
PICTURES, SOUNDS = 96, 16  # of a page, at most
SIDE = 128  # pixels of a thumbnail
SECONDS = 5  # of a recording that can be played
RATE = 16_000
BARS = 16

STYLE = """
:root { --paper: #fbfaf8; --card: #fff; --ink: #1d1f23; --faint: #667; --line: #e2dfd9; --error: #b3261e;
  --warning: #8a5a00; --accent: #2f5fb3; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1e2125; --ink: #e8e6e3; --faint: #9aa0a8;
  --line: #33373d; --error: #ff8a80; --warning: #f2b84b; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem; } h2 { font-size: 1.05rem; display: inline; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin-bottom: 1rem; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .6rem .8rem; } .tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tile span, .faint, .card small { color: var(--faint); }
.error { color: var(--error); } .warning { color: var(--warning); }
details { margin: .7rem 0; padding: .6rem .8rem; } summary { cursor: pointer; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .6rem;
  margin-top: .6rem; }
.card { display: flex; gap: .7rem; padding: .6rem; min-width: 0; }
.card > div:last-child { min-width: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.media { display: flex; flex-direction: column; gap: .3rem; flex: none; max-width: 8.5rem; }
.media img { max-width: 8rem; max-height: 8rem; border-radius: .3rem; background: var(--line); }
.media audio { width: 8.5rem; height: 2.2rem; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 5rem; }
.bars i { flex: 1; max-width: 3rem; background: var(--accent); border-radius: 2px 2px 0 0; min-height: 1px; }
.ends { display: flex; justify-content: space-between; color: var(--faint); font-size: .85rem; }
input { width: 100%; padding: .5rem .7rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
.learnt { background: color-mix(in srgb, var(--accent) 25%, transparent); border-radius: 3px; }
.turns { font-family: ui-monospace, "Noto Sans Mono CJK SC", monospace; font-size: .9rem; white-space: pre-wrap; }
"""
SCRIPT = """
document.querySelector('input').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase();
  for (const card of document.querySelectorAll('.card')) card.hidden = !card.textContent.toLowerCase().includes(wanted);
  for (const card of document.querySelectorAll('.card')) card.style.display = card.hidden ? 'none' : '';
});
"""


def page(title: str, body: str, script: str = "") -> str:
    """A whole document. `body` is HTML, `title` text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


class Shows:
    """Media as small HTML, as many as a page may hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.left = {"image": PICTURES, "audio": SOUNDS}

    def of(self, kind: str, path: Path) -> str:
        """A thumbnail of a picture or a video's first frame, or a player of a recording's beginning; '' where the file
        can't be decoded, or the page is full.
        """
        counted = "audio" if kind == "audio" else "image"
        if not self.left[counted]:
            return ""
        try:
            sampling: dict[str, Any] = {"count": 1} if kind == "video" else {}
            decoded = decode(kind, path, limits=self.limits, **sampling)
        except DataError:
            return ""  # why is what the page tells beside it
        self.left[counted] -= 1
        name = escape(path.name, quote=True)
        if kind == "audio":
            return f'<audio controls preload="none" title="{name}" src="{sound_uri(decoded)}"></audio>'
        picture = decoded.frames[0] if kind == "video" else decoded
        return f'<img loading="lazy" alt="{name}" src="{picture_uri(picture)}">'


def picture_uri(picture: Any, side: int = SIDE) -> str:
    """A PIL image as a JPEG of at most `side` pixels in a data URI."""
    small = picture.copy()
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def sound_uri(audio: Any, seconds: int = SECONDS) -> str:
    """The beginning of a decoded recording as Ogg Vorbis in a data URI."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, audio[: seconds * RATE], RATE, format="OGG", subtype="VORBIS")
    return f"data:audio/ogg;base64,{base64.b64encode(content.getvalue()).decode()}"


def card(media: Sequence[str], where: str, text: str) -> str:
    """One row: HTML of its media beside its place and text."""
    shown = f'<div class="media">{"".join(media)}</div>' if any(media) else ""
    return f'<div class="card">{shown}<div><small>{escape(where)}</small>\n{text}</div></div>'


def findings_page(ledger: Ledger, result: dict[str, Any], names: Sequence[str], path: Path, limits: Limits) -> None:
    """check.html: what was found, by kind, errors first, with the media that it is about."""
    shows = Shows(limits)

    def kind_of(media: str) -> str:
        found = next(ledger.query("select kind from uses where path = ? limit 1", media), None)
        return found[0] if found else ""

    def cards(code: str) -> Iterator[str]:
        for found in ledger.findings(code, SHOWN):
            paths = [path for path in (found.path, found.other) if path]
            if not paths and found.row is not None:
                paths = [path for (path,) in ledger.query("select path from uses where row = ? limit 2", found.row)]
            media = [shows.of(kind, Path(path)) for path in paths if (kind := kind_of(path))]
            where = place(found, names)
            yield card(media, where, told(found, where))

    sections = []
    for code, count in result["findings"].items():
        severity, title = CODES[code]
        more = f' <span class="faint">the first {SHOWN} are shown</span>' if count > SHOWN else ""
        sections.append(
            f"<details{' open' if severity == 'error' or len(result['findings']) < 6 else ''}><summary>"
            f'<h2 class="{severity}">{escape(title)}: {count:,}</h2>{more}</summary>'
            f'<div class="cards">{"".join(cards(code))}</div></details>'
        )
    body = [
        f"<h1>{escape(result['name'])}: rows before training</h1>",
        f'<div class="tiles">{"".join(_tiles(result))}</div>',
        '<input type="search" placeholder="Filter: a file, a line, a word" aria-label="Filter">',
        *sections,
        _lengths(ledger),
        f'<details open><summary><h2>A few rows as they are</h2></summary><div class="cards">'
        f"{''.join(_examples(ledger, names, shows))}</div></details>",
    ]
    path.write_text(page(f"{result['name']}: data", "\n".join(body), SCRIPT), encoding="utf-8")


def place(found: Finding, names: Sequence[str]) -> str:
    return f"{names[found.source]}:{found.number}" if found.number else names[found.source]


def told(found: Finding, where: str) -> str:
    media = " = ".join(Path(path).name for path in (found.path, found.other) if path)
    text = escape(found.text.removeprefix(f"{where}: "))
    return text + (f'\n<span class="faint">{escape(media)}</span>' if media else "")


def _tiles(result: dict[str, Any]) -> Iterator[str]:
    def tile(number: int, what: str, colour: str = "") -> str:
        return f'<div class="tile"><b class="{colour}">{number:,}</b><span>{escape(what)}</span></div>'

    yield tile(result["errors"], "errors", "error" if result["errors"] else "")
    yield tile(result["warnings"], "warnings", "warning" if result["warnings"] else "")
    yield tile(result["rows"], "rows read")
    for split, counts in result["splits"].items():
        yield tile(counts["rows"], f"{split} rows, {counts['tokens']:,} tokens")
    for kind, count in result["different_media"].items():
        yield tile(count, f"different {kind} files" if kind == "audio" else f"different {kind}s")


def _lengths(ledger: Ledger) -> str:
    """How long training rows are, in tokens."""
    low, high, rows = next(ledger.query("select min(tokens), max(tokens), count(*) from rows where split = 'train'"))
    if not rows:
        return ""
    width = max(1, -(-(high - low + 1) // BARS))
    query = "select (tokens - ?) / ? as bar, count(*) from rows where split = 'train' group by bar"
    counts = dict(ledger.query(query, low, width))
    most = max(counts.values())
    bars = "".join(
        f'<i style="height:{100 * counts.get(n, 0) / most:.1f}%" title="{low + n * width} to '
        f'{low + (n + 1) * width - 1} tokens: {counts.get(n, 0):,} rows"></i>'
        for n in range((high - low) // width + 1)
    )
    return (
        f"<details open><summary><h2>Tokens of training rows</h2></summary>"
        f'<div class="bars">{bars}</div><div class="ends"><span>{low:,}</span><span>{high:,}</span></div></details>'
    )


def _examples(ledger: Ledger, names: Sequence[str], shows: Shows) -> Iterator[str]:
    count = next(ledger.query("select count(*) from rows"))[0]
    step = max(1, count // EXAMPLES)
    query = "select id, source, number, split, tokens, answer from rows where id % ? = 0 order by id limit ?"
    rows = ledger.query(query, step, EXAMPLES)
    for row, source, number, split, tokens, answer in list(rows):
        media = [
            shows.of(kind, Path(path))
            for kind, path in list(ledger.query("select kind, path from uses where row = ? limit 4", row))
        ]
        text = f"{split}, {tokens:,} tokens" + (f": {answer}" if answer else "")
        yield card(media, f"{names[source]}:{number}", escape(text))
