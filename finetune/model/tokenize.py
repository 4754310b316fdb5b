"""Conversations to token ids and labels, by the chat template's own spans.

A medium is one placeholder in the rendered text; in the ids it becomes its segments, each a mark ("0.5s ", or nothing)
and a number of placeholder tokens. Labels are the assistant's tokens, its end-of-turn token included; media have none.
No text becomes a placeholder, or a token of the chat template: see `plain_text`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message, Sample
from finetune.model.composition import Segment, Segments
from finetune.model.plain_text import cut, encode, joined
from finetune.model.prefixes import IGNORED, Beginning
from finetune.model.template_limit import limited


@dataclass(frozen=True)
class Placeholder:
    token: str
    id: int


@dataclass(frozen=True)
class Tokens:
    """`input_ids` and `labels` are equally long; `media` in the order of their placeholders, `media_begins` and
    `media_ends` where in `input_ids` each begins and ends.
    """

    input_ids: list[int]
    labels: list[int]
    media: tuple[Medium, ...]
    media_begins: tuple[int, ...]
    media_ends: tuple[int, ...]

    @property
    def beginning(self) -> Beginning:
        """Media are equal that are the same file, or the same object."""
        media = tuple((medium.kind, medium.path, id(medium.content)) for medium in self.media)
        return Beginning(self.input_ids, len(self.input_ids) - 1, media, self.media_begins, self.media_ends)

    def before(self, tokens: int) -> "Tokens":
        """The first tokens, with the media among them."""
        count = sum(begin < tokens for begin in self.media_begins)
        media = (self.media[:count], self.media_begins[:count], self.media_ends[:count])
        return Tokens(self.input_ids[:tokens], self.labels[:tokens], *media)

    def after(self, tokens: int) -> "Tokens":
        """What follows the first tokens."""
        count = sum(begin < tokens for begin in self.media_begins)
        begins, ends = ([place - tokens for place in places[count:]] for places in (self.media_begins, self.media_ends))
        return Tokens(self.input_ids[tokens:], self.labels[tokens:], self.media[count:], tuple(begins), tuple(ends))


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
    input_ids, offsets = encode(text, tokenizer)
    spans = _assistant_spans(tokenizer, sample, placeholders, text)
    labels = [
        token if any(begin <= left and right <= end and right > begin for begin, end in spans) else IGNORED
        for token, (left, right) in zip(input_ids, offsets, strict=True)
    ]
    tokens = _expand(sample, tokenizer, input_ids, labels, placeholders, segments)
    if all(label == IGNORED for label in tokens.labels[1:]):
        raise DataError(f"{sample.where}: no token would be learned from this row: the chat template drops the answer")
    return tokens


def tokenize_prompt(
    messages: Sequence[Message],
    tokenizer: Any,
    placeholders: Mapping[str, Placeholder],
    segments: Segments,
    where: str = "prompt",
) -> Tokens:
    """A conversation up to where the assistant's turn begins."""
    text = _render(tokenizer, messages, placeholders, where, add_generation_prompt=True)
    input_ids, _ = encode(text, tokenizer)
    sample = Sample(tuple(messages), where)
    return _expand(sample, tokenizer, input_ids, [IGNORED] * len(input_ids), placeholders, segments)


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
        for part in joined(message.content):
            if isinstance(part, Medium):
                if part.kind not in placeholders:
                    takes = ", ".join(placeholders) or "text only"
                    raise DataError(f"{where}: holds {part.kind}, but this model takes {takes}")
                text += placeholders[part.kind].token
            else:
                text += cut(part, tokenizer)
        turns.append({"role": message.role, "content": text})
    try:
        with limited():
            result: str = tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_options(tokenizer),
            )
        return result
    except Exception as error:  # a template raises what its author chose, jinja2.TemplateError or anything else
        raise DataError(f"{where}: the LLM's chat template refuses the conversation: {error}") from error


_OPTIONS: dict[str, dict[str, bool]] = {}


def template_options(tokenizer: Any) -> dict[str, bool]:
    """Thinking off where prompt and answer then fit together: Qwen3's answers begin with an empty thought that only
    then is part of the prompt; other templates don't know the option, or put the thought into the prompt alone.
    """
    template = str(tokenizer.chat_template)
    if template not in _OPTIONS:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        off = {"enable_thinking": False}
        before = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, **off)
        after = tokenizer.apply_chat_template(turns, tokenize=False, **off)
        _OPTIONS[template] = off if after.startswith(before) else {}
    return _OPTIONS[template]


def _assistant_spans(
    tokenizer: Any, sample: Sample, placeholders: Mapping[str, Placeholder], text: str
) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns: what each adds to the prompt that asks for it."""
    spans = []
    for number, message in enumerate(sample.messages):
        if message.role != "assistant":
            continue
        if not "".join(part for part in message.content if isinstance(part, str)).strip():
            raise DataError(
                f"{sample.where}: turn {number}, the assistant's, is empty: there is nothing to learn from it"
            )
        before = _render(tokenizer, sample.messages[:number], placeholders, sample.where, add_generation_prompt=True)
        after = _render(tokenizer, sample.messages[: number + 1], placeholders, sample.where)
        if not text.startswith(after):  # Phi-3 closes a whole conversation with one more token
            after = after.removesuffix(tokenizer.eos_token)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{sample.where}: the chat template renders turn {number} otherwise in a longer conversation, so the "
                "answer's tokens can't be found; give a simpler `model.llm.chat_template`"
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
    if sum(token in ids for token in input_ids) != len(sample.media):
        raise DataError(f"{sample.where}: {len(sample.media)} media, but the chat template kept another number of them")
    media = iter(sample.media)
    out_ids: list[int] = []
    out_labels: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    for token, label in zip(input_ids, labels, strict=True):
        if token not in ids:
            out_ids.append(token)
            out_labels.append(label)
            continue
        begins.append(len(out_ids))
        out_ids += segment_ids(segments(next(media)), token, tokenizer)
        ends.append(len(out_ids))
        out_labels += [IGNORED] * (len(out_ids) - len(out_labels))
    return Tokens(out_ids, out_labels, sample.media, tuple(begins), tuple(ends))


def segment_ids(segments: Sequence[Segment], placeholder: int, tokenizer: Any) -> list[int]:
    """Token ids of a medium's segments: marks and placeholders."""
    ids: list[int] = []
    for mark, count in segments:
        ids += tokenizer(mark, add_special_tokens=False)["input_ids"] if mark else []
        ids += [placeholder] * count
    return ids
