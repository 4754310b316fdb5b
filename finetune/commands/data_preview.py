"""Rows as the model reads them: text that it learns to write, text that it only reads, and media as their tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands._reader import Reader, held_out
from finetune.common import display
from finetune.common.errors import DataError
from finetune.common.run_folder import write_text
from finetune.data.check.lenient import lenient_rows
from finetune.data.check.page import Thumbnails, render
from finetune.data.rows import group_of
from finetune.data.sample import Medium
from finetune.model.tokenize import IGNORED, Tokens
from finetune.recipe.load import RecipeLike, as_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A stretch of a row: `text` of `tokens` tokens, `ends` being where each of them ends in it; or a medium with its
    marks. `learned`: whether the model learns to write it.
    """

    text: str
    tokens: int
    learned: bool = False
    medium: Medium | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preview:
    """A row, or the `problem` that makes it unusable. `answer`: of a row that is read up to its answer only."""

    where: str
    pieces: tuple[Piece, ...] = ()
    answer: str = ""
    problem: str = ""

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def learned(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.learned)

    @property
    def summary(self) -> str:
        return "unusable" if self.problem else f"{self.tokens:,} tokens, {self.learned:,} learned"


@dataclass(frozen=True, repr=False)
class Previews(Sequence[Preview]):
    """The rows in their order; `page`: all of them with thumbnails, as HTML."""

    rows: tuple[Preview, ...]
    page: str

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return "\n".join(f"{preview.where}  {preview.summary}" for preview in self.rows)

    def _repr_html_(self) -> str:
        return display.page(self.page)


def data_preview(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    rows: int = 5,
    split: str = "train",
    html: Path | str | None = None,
    boundaries: bool = False,
) -> Previews:
    """The first `rows` rows of a split ("train", "validation", "test"), equally many of each source, unusable rows
    among them. `html`: also write a page with thumbnails; `boundaries`: find where each token ends.

    Raises RecipeError, ModelError; DataError if the split has no rows.
    """
    loaded = as_recipe(recipe, overrides)
    reader = Reader(loaded)
    sources, splits = loaded.data, held_out(loaded)
    shares = [{"test": source.hold_out, "validation": source.hold_out_validation} for source in sources]
    used = [n for n, source in enumerate(sources) if split == source.split or shares[n].get(split)]
    each = max(1, -(-rows // max(1, len(used))))
    previews = [preview for n in used for preview in _previews(reader, n, split, splits, each, boundaries)][:rows]
    if not previews:
        raise DataError(f"no row is for {split}: there are {', '.join(sorted({source.split for source in sources}))}")
    thumbnails = Thumbnails(loaded.media)
    page = render("preview.html", title=f"{loaded.name}: {split} rows", rows=previews, thumbnails=thumbnails)
    if html is not None:
        write_text(Path(html), page)
    return Previews(tuple(previews), page)


def _previews(
    reader: Reader, number: int, split: str, splits: dict[tuple[int, int], str], count: int, boundaries: bool
) -> Iterator[Preview]:
    source = reader.recipe.data[number]
    unreadable: list[Preview] = []
    shown = 0

    def report(line: int, text: str, raw: str) -> None:
        unreadable.append(Preview(text, problem=text))

    rows = lenient_rows(source, report, reader.recipe.media.max_bytes)
    for place, row in enumerate(rows):
        if shown == count:
            return
        try:
            sample = reader.sample(number, row)
            group_of(row, source)
            if splits.get((number, place), source.split) != split:
                continue
            tokens = reader.tokens(sample, number, split)
            learns = any(label != IGNORED for label in tokens.labels)
            yield Preview(sample.where, tuple(_pieces(reader, tokens, boundaries)), "" if learns else sample.answer)
        except DataError as error:
            yield Preview(row.where, problem=str(error))
        shown += 1
    yield from unreadable


def _pieces(reader: Reader, tokens: Tokens, boundaries: bool) -> Iterator[Piece]:
    """All of the row's tokens, in their order, as pieces."""
    tokenizer, placeholders = reader.components.tokenizer, {p.id for p in reader.components.placeholders.values()}
    ids, labels, position = tokens.input_ids, tokens.labels, 0
    media = iter(tokens.media)
    while position < len(ids):
        end = position
        medium = next(media, None)
        # A medium begins with its first mark, or its first placeholder.
        segments = reader.segments(medium) if medium else ()
        ahead = len(tokenizer(segments[0][0], add_special_tokens=False)["input_ids"]) if segments else 0
        while end < len(ids) and ids[end] not in placeholders:
            end += 1
        begin = max(position, end - ahead) if medium else end
        for learned, run in groupby(range(position, begin), key=lambda at: labels[at] != IGNORED):
            yield _text(tokenizer, [ids[at] for at in run], learned, boundaries)
        left, position = sum(count for _, count in segments), begin
        while left:
            left -= ids[position] in placeholders
            position += 1
        if medium:
            yield Piece(medium.path.name, position - begin, medium=medium)


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], learned: bool, boundaries: bool) -> Piece:
    def decoded(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=False))

    # A character of several tokens ends with the last of them: U+FFFD stands for an incomplete one.
    ends = tuple(len(decoded(n + 1).removesuffix("\ufffd")) for n in range(len(ids))) if boundaries else ()
    return Piece(decoded(len(ids)), len(ids), learned, ends=ends)
