"""Rows as the model will see them: the text that is learnt apart from what is only read, each medium as its tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.commands._reader import Asked, Reader
from finetune.common.errors import DataError
from finetune.common.run_folder import write_text
from finetune.data.check.inspect import digest_of
from finetune.data.check.lenient import lenient_rows
from finetune.data.check.page import Shows, page
from finetune.data.rows import group_of, split_of
from finetune.data.sample import Medium
from finetune.model.tokenize import IGNORED, Tokens
from finetune.recipe.load import load_recipe


@dataclass(frozen=True)
class Piece:
    """A stretch of a row: `text` of `tokens` tokens, with `ends`, where each of them ends in it; or a medium's tokens,
    its marks among them. `learnt`: whether the model learns to write it.
    """

    text: str
    tokens: int
    learnt: bool = False
    medium: Medium | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preview:
    """A row, or why it can't be used. `answer`: what is asked for where the row is read up to it only."""

    where: str
    pieces: tuple[Piece, ...] = ()
    answer: str = ""
    wrong: str = ""

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def learnt(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.learnt)


def data_preview(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    rows: int = 5,
    split: str = "train",
    html: Path | str | None = None,
    boundaries: bool = False,
) -> list[Preview]:
    """The first `rows` rows of a split ("train", "validation", "test"), of each source as many; those that can't be
    used are among them, with the reason. With `html` also as a page with thumbnails; with `boundaries` pieces tell
    where each token ends.

    Raises RecipeError, ModelError; DataError where the split has no rows.
    """
    loaded = load_recipe(recipe, overrides)
    reader = Reader(Asked.of(loaded))
    sources = reader.asked.sources
    used = [n for n, source in enumerate(sources) if split in (source.split, *_held_out(source))]
    found = [one for n in used for one in _previews(reader, n, split, max(1, -(-rows // len(used))), boundaries)][:rows]
    if not found:
        raise DataError(f"no row is for {split}: there are {', '.join(sorted({source.split for source in sources}))}")
    if html is not None:
        write_text(Path(html), _html(f"{loaded.name}: {split} rows", found, Shows(reader.asked.limits)))
    return found


def _held_out(source: Any) -> list[str]:
    shares = {"test": source.hold_out, "validation": source.hold_out_validation}
    return [split for split, share in shares.items() if share]


def _previews(reader: Reader, number: int, split: str, count: int, boundaries: bool) -> Iterator[Preview]:
    source = reader.asked.sources[number]
    wrong: list[Preview] = []
    shown = 0
    for row in lenient_rows(source, lambda line, text, raw: wrong.append(Preview(text, wrong=text))):
        if shown == count:
            return
        try:
            sample = reader.sample(number, row)
            group = group_of(row, source)
            if split_of(sample, group, source, reader.asked.seed, lambda m: digest_of(m.path).hex()) != split:
                continue
            tokens = reader.tokens(sample, number, split)
            learns = any(label != IGNORED for label in tokens.labels)
            yield Preview(sample.where, tuple(_pieces(reader, tokens, boundaries)), "" if learns else sample.answer)
        except DataError as error:
            yield Preview(row.where, wrong=str(error))
        shown += 1
    yield from wrong


def _pieces(reader: Reader, tokens: Tokens, boundaries: bool) -> Iterator[Piece]:
    """The row's tokens as pieces: together they are all of them, in their order."""
    tokenizer, placeholders = reader.parts.tokenizer, {p.id for p in reader.parts.placeholders.values()}
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
        for learnt, run in groupby(range(position, begin), key=lambda at: labels[at] != IGNORED):
            yield _text(tokenizer, [ids[at] for at in run], learnt, boundaries)
        left, position = sum(count for _, count in segments), begin
        while left:
            left -= ids[position] in placeholders
            position += 1
        if medium:
            yield Piece(medium.path.name, position - begin, medium=medium)


def _text(tokenizer: Any, ids: Sequence[int], learnt: bool, boundaries: bool) -> Piece:
    def decoded(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=False))

    # A character of several tokens ends with its last: what stands for a part of it isn't counted.
    ends = tuple(len(decoded(n + 1).removesuffix("\ufffd")) for n in range(len(ids))) if boundaries else ()
    return Piece(decoded(len(ids)), len(ids), learnt, ends=ends)


def _html(title: str, previews: Sequence[Preview], shows: Shows) -> str:
    def piece_html(piece: Piece) -> str:
        if piece.medium:
            shown = shows.of(piece.medium.kind, piece.medium.path)
            return f'<span class="media">{shown}<small>{escape(piece.text)}: {piece.tokens:,} tokens</small></span>'
        text = escape(piece.text)
        return f'<span class="learnt">{text}</span>' if piece.learnt else text

    cards = []
    for preview in previews:
        body = "".join(map(piece_html, preview.pieces))
        told = f"{preview.tokens:,} tokens, {preview.learnt:,} learnt"
        if preview.answer:
            told += f"; to be answered: {preview.answer}"
        if preview.wrong:
            body, told = f'<span class="error">{escape(preview.wrong)}</span>', "can't be used"
        head = f'<h2>{escape(preview.where)}</h2> <span class="faint">{escape(told)}</span>'
        cards.append(f'<details open><summary>{head}</summary><div class="turns">{body}</div></details>')
    told = '<p class="faint">Marked: what the model learns to write. All else is what it reads.</p>'
    return page(title, f"<h1>{escape(title)}</h1>\n{told}\n" + "\n".join(cards))
