"""Conversations to token ids and labels, by the chat template's own spans.

A medium is one placeholder in the rendered text; in the ids it becomes its segments, each a mark ("0.5s ", or nothing)
and a number of placeholder tokens. Labels are the assistant's tokens, its end-of-turn token included; media have none.
No text becomes a placeholder, or a token of the chat template: see `plain_text`.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message, Sample, texts_in
from finetune.model.composition import PlacedMedia, Segment, Segments
from finetune.model.plain_text import cut, encode, joined
from finetune.model.prefixes import IGNORED, Beginning
from finetune.model.template_limit import rendered

WORD = "qzq"  # that no chat template holds


@dataclass(frozen=True)
class Placeholder:
    """`token`: in the rendered text; `id`: of the tokens that stand for features. `native`: a base's chat template
    writes the token for a part of this kind, and its processor writes the medium's segments into the text, which is
    tokenized as a whole.
    """

    token: str
    id: int
    native: bool = False


@dataclass(frozen=True)
class Tokens:
    """`input_ids` and `labels` are equally long; `media` in the order of their placeholders, `media_begins` and
    `media_ends` where in `input_ids` each begins and ends. `positions` (3, T): where they have three dimensions.
    """

    input_ids: list[int]
    labels: list[int]
    media: tuple[Medium, ...]
    media_begins: tuple[int, ...]
    media_ends: tuple[int, ...]
    positions: list[list[int]] | None = None

    @property
    def beginning(self) -> Beginning:
        """Media are equal that are the same file, or the same object."""
        media = tuple((medium.kind, medium.path, id(medium.content)) for medium in self.media)
        return Beginning(self.input_ids, len(self.input_ids) - 1, media, self.media_begins, self.media_ends)

    def with_positions(self) -> "Tokens":
        """The same with its positions written out."""
        plain = [list(range(len(self.input_ids)))] * 3
        return self if self.positions else replace(self, positions=plain)

    def before(self, tokens: int) -> "Tokens":
        """The first tokens, with the media among them."""
        count = sum(begin < tokens for begin in self.media_begins)
        media = (self.media[:count], self.media_begins[:count], self.media_ends[:count])
        positions = self.positions and [row[:tokens] for row in self.positions]
        return Tokens(self.input_ids[:tokens], self.labels[:tokens], *media, positions)

    def after(self, tokens: int) -> "Tokens":
        """What follows the first tokens."""
        count = sum(begin < tokens for begin in self.media_begins)
        begins, ends = ([place - tokens for place in places[count:]] for places in (self.media_begins, self.media_ends))
        positions = self.positions and [row[tokens:] for row in self.positions]
        media = (self.media[count:], tuple(begins), tuple(ends))
        return Tokens(self.input_ids[tokens:], self.labels[tokens:], *media, positions)


def add_placeholders(tokenizer: Any, kinds: Sequence[str], tokens: Mapping[str, str]) -> dict[str, Placeholder]:
    """Make each kind's placeholder a real, special token of the tokenizer."""
    from transformers import AddedToken

    new = [AddedToken(tokens[kind], special=True, normalized=False) for kind in kinds]
    tokenizer.add_tokens(new, special_tokens=True)
    return {kind: Placeholder(tokens[kind], tokenizer.convert_tokens_to_ids(tokens[kind])) for kind in kinds}


def tokenize(sample: Sample, tokenizer: Any, placeholders: Mapping[str, Placeholder], segments: Segments) -> Tokens:
    """A whole conversation with labels.

    Raises DataError, with the row, where nothing would be learned, or the chat template doesn't render a conversation
    as a prefix of its continuation.
    """
    text = _render(tokenizer, sample.messages, placeholders, sample.where)
    last = isinstance(segments, PlacedMedia) and segments.placement.prompts_both_ways
    spans = _assistant_spans(tokenizer, sample, placeholders, text, last)
    tokens = _tokens(sample, tokenizer, placeholders, segments, text, spans)
    if all(label == IGNORED for label in tokens.labels[1:]):
        raise DataError(f"{sample.where}: no token would be learned from this row: the chat template drops the answer")
    return tokens


def _labels(
    input_ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The tokens inside the spans; IGNORED in the place of the others."""
    labels = [IGNORED] * len(input_ids)
    for begin, end in spans:
        for place, (left, right) in enumerate(offsets):
            if begin <= left and begin < right <= end:
                labels[place] = input_ids[place]
    return labels


def tokenize_prompt(
    messages: Sequence[Message],
    tokenizer: Any,
    placeholders: Mapping[str, Placeholder],
    segments: Segments,
    where: str = "prompt",
) -> Tokens:
    """A conversation up to where the assistant's turn begins."""
    text = _render(tokenizer, messages, placeholders, where, add_generation_prompt=True)
    return _tokens(Sample(tuple(messages), where), tokenizer, placeholders, segments, text, ())


def _tokens(
    sample: Sample,
    tokenizer: Any,
    placeholders: Mapping[str, Placeholder],
    segments: Segments,
    text: str,
    spans: Sequence[tuple[int, int]],
) -> Tokens:
    """Of a rendered conversation; those inside the `spans` of its text are learned."""
    if any(placeholder.native for placeholder in placeholders.values()):
        return _native(sample, tokenizer, placeholders, segments, text, spans)
    input_ids, offsets = encode(text, tokenizer)
    return _expand(sample, tokenizer, input_ids, _labels(input_ids, offsets, spans), placeholders, segments)


def answer_ends(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end an answer: the one that the chat template ends a turn with, which is what is learned, the
    tokenizer's, and those that the LLM came with.
    """
    last = answer_tokens("b", tokenizer)[-1]
    ends = {tokenizer.eos_token_id}
    if last in tokenizer.get_added_vocab().values():
        ends.add(last)
    own = generation_config.eos_token_id
    ends.update(own if isinstance(own, list) else [own])
    return sorted(ends - {None})


def answer_tokens(text: str, tokenizer: Any) -> list[int]:
    """What is learned of an answer: its tokens, and the one that ends the turn."""
    turn = Sample((Message("user", ("a",)), Message("assistant", (text,))), "answer")
    return [label for label in tokenize(turn, tokenizer, {}, lambda medium: []).labels if label != IGNORED]


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    placeholders: Mapping[str, Placeholder],
    where: str,
    add_generation_prompt: bool = False,
) -> str:
    turns = []
    for message in messages:
        text = ""
        parts: list[dict[str, str]] = []
        for part in joined(message.content):
            if isinstance(part, Medium):
                if part.kind not in placeholders:
                    takes = ", ".join(placeholders) or "text only"
                    raise DataError(f"{where}: holds {part.kind}, but this model takes {takes}")
                text += placeholders[part.kind].token
                parts.append({"type": part.kind, part.kind: ""})  # some templates need the key
            else:
                plain = cut(part, tokenizer)
                inside = [p.token for p in placeholders.values() if p.token in plain]
                if inside:  # it is no token of its own in this tokenizer
                    raise DataError(f"{where}: the text holds {inside[0]!r}, which stands for media only")
                text += plain
                parts.append({"type": "text", "text": plain})
        turns.append({"role": message.role, "content": parts if takes_parts(tokenizer) else text})
    try:
        return rendered(tokenizer, turns, add_generation_prompt, **template_options(tokenizer))
    except Exception as error:  # a template raises what its author chose, jinja2.TemplateError or anything else
        raise DataError(f"{where}: the LLM's chat template refuses the conversation: {error}") from error


_PARTS: dict[str, bool] = {}


def takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template wants a message as a list of its parts, text and media: those of bases do. Templates
    that render both are given parts only if they know of media.
    """
    template = str(tokenizer.chat_template)
    if template not in _PARTS:
        known = re.search(r"""['"](image|audio|video)['"]""", template) is not None
        _PARTS[template] = known and _renders(tokenizer, [{"type": "text", "text": WORD}])
    return _PARTS[template]


def text_content(tokenizer: Any, text: str) -> Any:
    """The content of a message that is only text, as the chat template takes it."""
    return [{"type": "text", "text": text}] if takes_parts(tokenizer) else text


def _renders(tokenizer: Any, content: Any) -> bool:
    turns = [{"role": "user", "content": content}]
    try:
        text = rendered(tokenizer, turns, True)
    except Exception:  # of whatever kind the template raises
        return False
    return WORD in text and "'type'" not in text


_OPTIONS: dict[str, dict[str, bool]] = {}


def template_options(tokenizer: Any) -> dict[str, bool]:
    """Thinking off where prompt and answer then fit together: Qwen3's answers begin with an empty thought that only
    then is part of the prompt; other templates don't know the option, or put the thought into the prompt alone.
    """
    template = str(tokenizer.chat_template)
    if template not in _OPTIONS:
        texts = {"user": "a", "assistant": "b"}
        turns = [{"role": role, "content": text_content(tokenizer, text)} for role, text in texts.items()]
        off = {"enable_thinking": False}
        fit = rendered(tokenizer, turns, **off).startswith(rendered(tokenizer, turns[:1], True, **off))
        _OPTIONS[template] = off if fit else {}
    return _OPTIONS[template]


def _native(
    sample: Sample,
    tokenizer: Any,
    placeholders: Mapping[str, Placeholder],
    segments: Segments,
    text: str,
    spans: Sequence[tuple[int, int]],
) -> Tokens:
    """The text with the segments of each medium in the place of its token, tokenized as a whole, as processors of
    transformers do. `spans`: of the answers, in `text`. Media come in the order of the text.
    """
    waiting = {kind: [medium for medium in sample.media if medium.kind == kind] for kind in placeholders}
    kinds = {placeholder.token: kind for kind, placeholder in placeholders.items()}
    written = {kind: tokenizer.convert_ids_to_tokens(placeholder.id) for kind, placeholder in placeholders.items()}
    pieces: list[str] = []
    media: list[Medium] = []
    places: list[tuple[int, int]] = []  # of the media, in the whole text
    moves = [(0, 0)]  # (place in `text`, how much further what follows it stands in the whole)
    length = last = 0
    for match in re.finditer("|".join(map(re.escape, kinds)), text):
        kind = kinds[match[0]]
        if not waiting[kind]:
            break
        medium = waiting[kind].pop(0)
        stands = "".join(mark + written[kind] * count for mark, count in segments(medium))
        before = text[last : match.start()]
        pieces += [before, stands]
        places.append((length + len(before), length + len(before) + len(stands)))
        length, last = places[-1][1], match.end()
        moves.append((last, length - last))
        media.append(medium)
    if len(media) != len(sample.media) or re.search("|".join(map(re.escape, kinds)), text[last:]):
        raise DataError(f"{sample.where}: {len(sample.media)} media, but the chat template kept another number of them")
    input_ids, offsets = encode("".join([*pieces, text[last:]]), tokenizer)
    moved = [[place + [by for begin, by in moves if begin <= place][-1] for place in span] for span in spans]
    labels = _labels(input_ids, offsets, [(begin, end) for begin, end in moved])
    lefts, rights = [left for left, _ in offsets], [right for _, right in offsets]
    begins = tuple(bisect_right(rights, begin) for begin, _ in places)
    ends = tuple(bisect_left(lefts, end) for _, end in places)
    for begin, end in zip(begins, ends, strict=True):
        labels[begin:end] = [IGNORED] * (end - begin)
    positions = segments.positions(input_ids, media) if isinstance(segments, PlacedMedia) else None
    return Tokens(input_ids, labels, tuple(media), begins, ends, positions)


def _assistant_spans(
    tokenizer: Any, sample: Sample, placeholders: Mapping[str, Placeholder], text: str, last: bool = False
) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns, or of the last one: what each adds to the prompt that asks for it."""
    spans = []
    turns = [number for number, message in enumerate(sample.messages) if message.role == "assistant"]
    for number in turns[-1:] if last else turns:
        message = sample.messages[number]
        if not "".join(texts_in([message])).strip():
            raise DataError(
                f"{sample.where}: turn {number}, the assistant's, is empty: there is nothing to learn from it"
            )
        before = _render(tokenizer, sample.messages[:number], placeholders, sample.where, add_generation_prompt=True)
        last = number + 1 == len(sample.messages)
        after = text if last else _render(tokenizer, sample.messages[: number + 1], placeholders, sample.where)
        if not text.startswith(after):  # Phi-3 closes a whole conversation with one more token
            after = after.removesuffix(tokenizer.eos_token)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{sample.where}: the chat template renders turn {number} otherwise in a longer conversation, so the "
                "answer's tokens can't be found; give a simpler `chat_template`"
            )
        end = len(after)
        stripped = after.rstrip()
        # Templates end a turn with "<end>\n": the line break belongs to the next turn, generation stops before it.
        if stripped.endswith(tuple(tokenizer.get_added_vocab())):
            end = len(stripped)
        spans.append((len(before), end))
    return spans


def _expand(
    sample: Sample,
    tokenizer: Any,
    input_ids: Sequence[int],
    labels: Sequence[int],
    placeholders: Mapping[str, Placeholder],
    segments: Segments,
) -> Tokens:
    ids = {placeholder.id for placeholder in placeholders.values()}
    places = [place for place, token in enumerate(input_ids) if token in ids]
    if len(places) != len(sample.media):
        raise DataError(f"{sample.where}: {len(sample.media)} media, but the chat template kept another number of them")
    out_ids: list[int] = []
    out_labels: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    last = 0
    for place, medium in zip(places, sample.media, strict=True):
        out_ids += input_ids[last:place]
        out_labels += labels[last:place]
        begins.append(len(out_ids))
        out_ids += segment_ids(segments(medium), input_ids[place], tokenizer)
        ends.append(len(out_ids))
        out_labels += [IGNORED] * (len(out_ids) - len(out_labels))
        last = place + 1
    out_ids += input_ids[last:]
    out_labels += labels[last:]
    return Tokens(out_ids, out_labels, sample.media, tuple(begins), tuple(ends))


def segment_ids(segments: Sequence[Segment], placeholder: int, tokenizer: Any) -> list[int]:
    """Token ids of a medium's segments: marks and placeholders."""
    ids: list[int] = []
    for mark, count in segments:
        ids += tokenizer(mark, add_special_tokens=False)["input_ids"] if mark else []
        ids += [placeholder] * count
    return ids
