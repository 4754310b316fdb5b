"""From a request to what the model reads: decoded media and token ids. In threads of its own, beside the worker."""

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from finetune.common.errors import DataError
from finetune.data.sample import Layout, Medium, Message, Prepared
from finetune.model.assistant import Assistant, Look, without_kinds
from finetune.model.build import segments_by
from finetune.model.features import encode_one, read_medium
from finetune.model.language_model import context_length
from finetune.model.tokenize import Tokens, tokenize_prompt
from finetune.serving.engine.cache import Kept
from finetune.serving.engine.contract import Busy

RETRY_SECONDS = 2.0  # when too many media wait


@dataclass(eq=False)
class Seen:
    """A medium of requests. `name` tells its content; once it is decoded, `features` (S, L, W) are known, or `prepared`
    gives them. `lock`: held by who decodes it.
    """

    name: str
    layout: Layout | None = None
    prepared: Prepared | None = None
    features: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def known(self) -> bool:
        return self.prepared is not None or self.features is not None


class InFlight:
    """Media of requests that wait or run, each once. `limit`: of what is decoded and not encoded yet, bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._seen: WeakValueDictionary[str, Seen] = WeakValueDictionary()

    def seen(self, name: str) -> Seen:
        with self._lock:
            return self._seen.setdefault(name, Seen(name))

    def bytes(self, but: Collection[Seen] = ()) -> int:
        """Of all that wait, but those."""
        with self._lock:
            waiting = [seen.prepared for seen in self._seen.values() if seen not in but]
        return sum(prepared.values.nbytes for prepared in waiting if prepared is not None)


@dataclass
class Prompt:
    """Token ids, and for each a text that tells it apart: its id, or its medium's name. `media`: {kind: in order}."""

    input_ids: list[int]
    symbols: list[str]
    media: dict[str, list[Seen]]


class Media:
    """Media of one model, decoded and encoded once as long as their features are kept; hits and misses are counted."""

    def __init__(self, assistant: Assistant, kept: Kept, flying: InFlight, counters: dict[str, float]) -> None:
        self.assistant, self.kept, self.flying, self.counters = assistant, kept, flying, counters

    def see(self, messages: Sequence[Message]) -> dict[Medium, Seen]:
        """Decode and preprocess a request's media, but what is there. Raises DataError, and Busy where those of others
        that wait are all that memory may hold.
        """
        seen: dict[Medium, Seen] = {}
        for message in messages:
            for part in message.content:
                if isinstance(part, Medium) and part not in seen:
                    seen[part] = self._see(part, seen.values())
        return seen

    def _see(self, medium: Medium, own: Collection[Seen]) -> Seen:
        encoder = self.assistant.encoders.get(medium.kind)
        if encoder is None:
            takes = ", ".join(self.assistant.encoders) or "text only"
            raise DataError(f"this model takes {takes}, not {medium.kind}")
        name = f"{medium.kind} {id(encoder)} {_hash(medium.path)}"  # adapters may share an encoder, and then features
        seen = self.flying.seen(name)
        with seen.lock:
            if not seen.known and (found := self.kept.get(name)) is not None:
                seen.layout, seen.features = found
            if not seen.known:
                if self.flying.bytes(own) >= self.flying.limit:
                    raise Busy(RETRY_SECONDS)
                prepared = read_medium(encoder, medium.kind, medium.path, self.assistant.limits)
                seen.layout, seen.prepared = prepared.layout, prepared
        return seen

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

    Raises DataError for media that can't be read, and for what is too long; Busy as `Media.see`.
    """
    messages = without_kinds(messages, [kind for kind in weights if weights[kind] == 0])
    seen = media.see(messages)
    segments = segments_by(assistant.model.config, _layouts(seen))
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


def _layouts(seen: Mapping[Medium, Seen]) -> Callable[[Medium], Layout]:
    def layout(medium: Medium) -> Layout:
        found = seen[medium].layout
        assert found is not None  # as `Media.see` left it
        return found

    return layout


def _symbols(assistant: Assistant, tokens: Tokens, seen: Mapping[Medium, Seen], segments: Any) -> list[str]:
    """A placeholder is told by its medium's content: where in it, the tokens before it tell."""
    kinds = {placeholder.id: kind for kind, placeholder in assistant.placeholders.items()}
    own = [seen[medium].name for medium in tokens.media for _, count in segments(medium) for _ in range(count)]
    names = iter(own)
    return [next(names) if token in kinds else str(token) for token in tokens.input_ids]


def looked_at(media: Media, messages: Sequence[Message]) -> Look:
    """A conversation's media, decoded now, for a head that the worker asks later. Raises as `Media.see`."""
    seen = media.see(messages)
    return Look(_layouts(seen), lambda medium: media.features(medium.kind, seen[medium]))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""  # decoding says what is wrong with it
