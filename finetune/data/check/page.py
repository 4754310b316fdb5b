"""Self-contained pages about rows: styles, script, thumbnails and sound inside one file, nothing fetched."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.common.display import data_uri
from finetune.common.errors import DataError
from finetune.common.run_folder import write_text
from finetune.data.check.ledger import CODES, Finding, Ledger, Summary
from finetune.data.media import decode
from finetune.data.media.audio import RATE
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SHOWN = 24  # findings of a kind on the page; all are in check.json
EXAMPLES = 6  # rows from all over the data, with and without findings
PICTURES, SOUNDS = 96, 16  # of a page, at most
SIDE = 128  # pixels of a thumbnail
SECONDS = 5  # of a recording that can be played
BARS = 16


@dataclass(frozen=True)
class InlineMedium:
    """A medium inside a page: a picture ("image") or a recording ("audio"), the name of its file, and a data URI."""

    kind: str
    name: str
    uri: str


@dataclass(frozen=True)
class RowCard:
    """One row of a page. `files`: names of the media that a finding is about."""

    where: str
    text: str
    media: tuple[InlineMedium, ...] = ()
    files: str = ""


def render(template: str, **values: object) -> str:
    """A template of `pages/`; text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


class Thumbnails:
    """Small versions of media, as many as a page may hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.left = {"image": PICTURES, "audio": SOUNDS}

    def of(self, kind: str, path: Path) -> InlineMedium | None:
        """A picture or a video's first frame, or a recording's beginning; None for a file that can't be decoded, or
        when the page is full.
        """
        shown_as = "audio" if kind == "audio" else "image"
        if not self.left[shown_as]:
            return None
        try:
            medium = next(embedded(kind, path, self.limits))
        except DataError:
            return None  # the page tells the reason beside it
        self.left[shown_as] -= 1
        return medium


def embedded(
    kind: str, path: Path, limits: Limits, *, side: int = SIDE, seconds: int = SECONDS, frames: int = 1
) -> Iterator[InlineMedium]:
    """A picture of at most `side` pixels, a recording's first `seconds`, or some `frames` of a video. Raises DataError
    for a file that can't be decoded.
    """
    if kind == "audio":
        yield InlineMedium("audio", path.name, sound_uri(decode(kind, path, limits=limits), seconds))
    elif kind == "video":
        for frame in decode(kind, path, limits=limits, count=frames).frames:
            yield InlineMedium("image", path.name, picture_uri(frame, side))
    else:
        yield InlineMedium("image", path.name, picture_uri(decode(kind, path, limits=limits), side))


def picture_uri(picture: "Image", side: int, kind: str = "jpeg", quality: int = 80) -> str:
    """A picture (RGB) of at most `side` pixels in a data URI."""
    small = picture.copy()
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, kind, quality=quality)
    return data_uri(f"image/{kind}", content.getvalue())


def sound_uri(audio: "np.ndarray", seconds: int) -> str:
    """The beginning of a recording, float32 (samples,) at 16 kHz, as Ogg Vorbis in a data URI."""
    import soundfile

    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", RATE, 1, format="OGG", subtype="VORBIS") as file:
        for second in range(seconds):  # libsndfile crashes on minutes at once
            file.write(audio[second * RATE : (second + 1) * RATE])
    return data_uri("audio/ogg", content.getvalue())


def findings_page(ledger: Ledger, summary: Summary, path: Path, limits: Limits) -> None:
    """Write check.html: findings by kind, errors first, with the media that they are about."""
    thumbnails = Thumbnails(limits)
    cards = {
        code: [_card(ledger, finding, thumbnails) for finding in ledger.findings(code, SHOWN)]
        for code in summary["findings"]
    }
    page = render(
        "findings.html",
        title=f"{summary['name']}: rows before training",
        summary=summary,
        codes=CODES,
        cards=cards,
        lengths=_lengths(ledger),
        examples=list(_examples(ledger, thumbnails)),
    )
    write_text(path, page)


def _card(ledger: Ledger, finding: Finding, thumbnails: Thumbnails) -> RowCard:
    paths = [path for path in (finding.path, finding.other) if path]
    files = " = ".join(Path(path).name for path in paths)
    if not paths and finding.row is not None:
        paths = [path for (path,) in ledger.query("select path from uses where row = ? limit 2", finding.row)]
    kinds = [next(ledger.query("select kind from uses where path = ? limit 1", path), ("",))[0] for path in paths]
    media = [thumbnails.of(kind, Path(path)) for kind, path in zip(kinds, paths, strict=True) if kind]
    where = ledger.where(finding.source, finding.number)
    return RowCard(where, finding.text.removeprefix(f"{where}: "), tuple(filter(None, media)), files)


def _lengths(ledger: Ledger) -> list[tuple[int, int, int]]:
    """A histogram of tokens per training row: (least, most, rows with so many tokens) of each bar."""
    low, high, rows = next(ledger.query("select min(tokens), max(tokens), count(*) from rows where split = 'train'"))
    if not rows:
        return []
    width = max(1, -(-(high - low + 1) // BARS))
    query = "select (tokens - ?) / ? as bar, count(*) from rows where split = 'train' group by bar"
    counts = dict(ledger.query(query, low, width))
    starts = enumerate(range(low, high + 1, width))
    return [(start, min(start + width - 1, high), counts.get(bar, 0)) for bar, start in starts]


def _examples(ledger: Ledger, thumbnails: Thumbnails) -> Iterator[RowCard]:
    step = max(1, next(ledger.query("select count(*) from rows"))[0] // EXAMPLES)
    query = "select id, source, number, split, tokens, answer from rows where id % ? = 0 order by id limit ?"
    for row, source, number, split, tokens, answer in list(ledger.query(query, step, EXAMPLES)):
        uses = list(ledger.query("select kind, path from uses where row = ? limit 4", row))
        media = tuple(filter(None, (thumbnails.of(kind, Path(path)) for kind, path in uses)))
        text = f"{split}, {tokens:,} tokens" + (f": {answer}" if answer else "")
        yield RowCard(ledger.where(source, number), text, media)
