"""From a request to what the model reads: decoded media and token ids. In threads of its own, beside the worker."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.assemble import encode_one, read_medium, segments_by
from finetune.assistant import Assistant, Look, without_kinds
from finetune.data.sample import Layout, Medium, Message, Prepared
from finetune.data.tokenize import Tokens, tokenize_prompt
from finetune.errors import DataError
from finetune.language_model import context_length
from finetune.serving.cache import Kept


@dataclass
class Seen:
    """A medium of a request. `name` tells its content; `features` (S, L, W) are known, or `prepared` gives them."""

    name: str
    layout: Layout
    prepared: Prepared | None = None
    features: Tensor | None = None


@dataclass
class Prompt:
    """Token ids, and for each a text that tells it apart: its id, or its medium's name. `media`: {kind: in order}."""

    input_ids: list[int]
    symbols: list[str]
    media: dict[str, list[Seen]]


class Media:
    """Media of one model, decoded and encoded once as long as their features are kept; hits and misses are counted."""

    def __init__(self, assistant: Assistant, kept: Kept, counters: dict[str, float]) -> None:
        self.assistant, self.kept, self.counters = assistant, kept, counters

    def see(self, medium: Medium) -> Seen:
        """Decode and preprocess, unless its features are there. Raises DataError."""
        encoder = self.assistant.encoders.get(medium.kind)
        if encoder is None:
            takes = ", ".join(self.assistant.encoders) or "text only"
            raise DataError(f"this model takes {takes}, not {medium.kind}")
        name = f"{medium.kind} {id(encoder)} {_hash(medium.path)}"  # adapters may share an encoder, and then features
        if (found := self.kept.get(name)) is not None:
            return Seen(name, found[0], features=found[1])
        prepared = read_medium(encoder, medium.kind, medium.path, self.assistant.limits)
        return Seen(name, prepared.layout, prepared)

    def features(self, kind: str, seen: Seen) -> Tensor:
        """(S, L, W), from the cache or computed now: by the worker."""
        if seen.features is None and (found := self.kept.get(seen.name)) is not None:
            seen.features = found[1]
        self.counters["media_cache_hits" if seen.features is not None else "media_cache_misses"] += 1
        if seen.features is None:
            assert seen.prepared is not None
            seen.features = encode_one(self.assistant.encoders[kind], seen.prepared)
            self.kept.put(seen.name, (seen.layout, seen.features), seen.features.nbytes)
        seen.prepared = None
        return seen.features


def read_prompt(
    assistant: Assistant, media: Media, messages: Sequence[Message], weights: Mapping[str, float], room: int
) -> Prompt:
    """A conversation as the model reads it, media of no weight left out. `room`: the most tokens it may take.

    Raises DataError for media that can't be read, and for what is too long.
    """
    seen: dict[Medium, Seen] = {}

    def layout(medium: Medium) -> Layout:
        if medium not in seen:
            seen[medium] = media.see(medium)
        return seen[medium].layout

    messages = without_kinds(messages, [kind for kind in weights if weights[kind] == 0])
    segments = segments_by(assistant.model.config, layout)
    tokens = tokenize_prompt(messages, assistant.tokenizer, assistant.placeholders, segments)
    length, context = len(tokens.input_ids), context_length(assistant.model.causal_lm)
    if context and length >= context:
        raise DataError(f"a prompt of {length} tokens, but the LLM reads {context}: fewer media, or shorter text")
    if length >= room:
        raise DataError(f"a prompt of {length} tokens, but this server takes {room}: fewer media, or shorter text")
    found: dict[str, list[Seen]] = {}
    for medium in tokens.media:
        found.setdefault(medium.kind, []).append(seen[medium])
    return Prompt(tokens.input_ids, _symbols(assistant, tokens, seen, segments), found)


def _symbols(assistant: Assistant, tokens: Tokens, seen: Mapping[Medium, Seen], segments: Any) -> list[str]:
    """A placeholder is told by its medium's content: where in it, the tokens before it tell."""
    kinds = {placeholder.id: kind for kind, placeholder in assistant.placeholders.items()}
    own = [seen[medium].name for medium in tokens.media for _, count in segments(medium) for _ in range(count)]
    names = iter(own)
    return [next(names) if token in kinds else str(token) for token in tokens.input_ids]


def looked_at(media: Media, messages: Sequence[Message]) -> Look:
    """A conversation's media, decoded now, for a head that the worker asks later. Raises DataError."""
    parts = [part for message in messages for part in message.content if isinstance(part, Medium)]
    seen = {medium: media.see(medium) for medium in parts}
    return Look(lambda medium: seen[medium].layout, lambda medium: media.features(medium.kind, seen[medium]))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""  # decoding says what is wrong with it
