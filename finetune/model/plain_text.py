"""Text of a conversation stays text: control tokens come from the chat template and from media alone, whatever the text
of a row or a request spells.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from finetune.data.sample import Medium
from finetune.model.template_limit import rendered

CUT = "\ufdd0"  # a noncharacter of Unicode, which no text holds: where text is tokenized in two
CONTEXTS = ("\n", ".", "0", "a")  # what a piece may stand behind, so that it isn't taken for a beginning

_PATTERNS: WeakKeyDictionary[Any, tuple[str, int, re.Pattern[str] | None]] = WeakKeyDictionary()


def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches where the text of a control token begins, up to its second character: of special tokens, and of those
    that the chat template writes between turns; None where there are none.
    """
    template, size = str(tokenizer.chat_template), len(tokenizer)
    if tokenizer in _PATTERNS and _PATTERNS[tokenizer][:2] == (template, size):
        return _PATTERNS[tokenizer][2]
    added = tokenizer.added_tokens_decoder.values()
    between = _between_turns(tokenizer)
    texts = {token.content for token in added if token.special or token.content in between}
    longer = sorted(text for text in texts if len(text) > 1)
    ahead = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in longer)
    _PATTERNS[tokenizer] = template, size, re.compile(ahead) if longer else None
    return _PATTERNS[tokenizer][2]


def _between_turns(tokenizer: Any) -> str:
    """What the chat template writes of a conversation, for templates of plain text and for those of parts."""
    texts = (("user", "a"), ("assistant", "b"), ("user", "c"))
    written = ""
    for content_of in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        turns = [{"role": role, "content": content_of(text)} for role, text in texts]
        try:
            written += rendered(tokenizer, turns)
        except Exception:  # it takes the other kind; one that takes none is reported where a conversation is rendered
            continue
    return written


def cut(text: str, tokenizer: Any) -> str:
    """The text with CUT in each control token that it spells."""
    pattern = control_tokens(tokenizer)
    text = text.replace(CUT, "")
    return pattern.sub(lambda match: match[0] + CUT, text) if pattern else text


def spelled(text: str, tokenizer: Any) -> list[str]:
    """The control tokens that a text spells."""
    pattern = control_tokens(tokenizer)
    if pattern is None or not pattern.search(text):
        return []
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.content in text)


def joined(content: Sequence[str | Medium]) -> Iterator[str | Medium]:
    """The parts of a message, texts that follow each other as one: together they may spell a token."""
    text = ""
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text


def encode(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids, their places in the text) of rendered text; each piece between CUTs is tokenized by itself."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    begin = 0
    for number, piece in enumerate(text.split(CUT)):
        own, places = _encode_behind(piece, tokenizer) if number else _encode(piece, tokenizer)
        ids += own
        offsets += [(begin + left, begin + right) for left, right in places] if begin else places
        begin += len(piece) + len(CUT)
    return ids, offsets


def _encode(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _encode_behind(piece: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize as after other text: some tokenizers put a space before the first token."""
    for context in CONTEXTS:
        ids, offsets = _encode(context + piece, tokenizer)
        first = next((place for place, (left, right) in enumerate(offsets) if right > len(context)), len(ids))
        if first == len(ids) or offsets[first][0] >= len(context):
            return ids[first:], [(left - len(context), right - len(context)) for left, right in offsets[first:]]
    return _encode(piece, tokenizer)
