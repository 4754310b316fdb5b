"""From a request to the LLM's input: decoded media and token ids. Runs in reader threads, beside the worker."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from finetune.common.errors import DataError
from finetune.common.run_folder import file_hash
from finetune.data.sample import Layout, Medium, Message, Prepared, by_kind, media_in
from finetune.model.assistant import Assistant, without_kinds
from finetune.model.features import encode_one, read_medium
from finetune.model.language_model import context_length
from finetune.model.tokenize import Segments, Tokens, tokenize_prompt
from finetune.serving.engine.cache import LRUCache
from finetune.serving.engine.contract import Busy

RETRY_SECONDS = 2.0  # when too many media are waiting
FeatureCache = LRUCache[tuple[Layout, Tensor]]


@dataclass(eq=False)
class SharedMedium:
    """A medium of one or more requests. `name` identifies its content. Once it has been decoded, `layout` is set, and
    either `prepared` or `features` (S, L, W). `lock`: held while it is decoded.
    """

    name: str
    layout: Layout | None = None
    prepared: Prepared | None = None
    features: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def decoded(self) -> bool:
        return self.prepared is not None or self.features is not None


class MediaPool:
    """The media of waiting and running requests, each once. `limit`: bytes decoded and not yet encoded."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._media: WeakValueDictionary[str, SharedMedium] = WeakValueDictionary()

    def medium(self, name: str) -> SharedMedium:
        with self._lock:
            return self._media.setdefault(name, SharedMedium(name))

    def waiting_bytes(self, exclude: Collection[SharedMedium] = ()) -> int:
        with self._lock:
            waiting = [medium.prepared for medium in self._media.values() if medium not in exclude]
        return sum(tensor.nbytes for prepared in waiting if prepared is not None for tensor in prepared.tensors)


@dataclass
class RequestPrompt:
    """Token ids; `symbols`, a text per token for the prefix cache: its id, or its medium's name; `media` by kind, in
    the order of their placeholders; `positions` (3, T), where they have three dimensions.
    """

    input_ids: list[int]
    symbols: list[str]
    media: dict[str, list[SharedMedium]]
    positions: list[list[int]] | None = None


class MediaReader:
    """Decodes and encodes the media of one model, each only once while its features are cached. `count(NAME)` is
    called for each hit and miss of that cache.
    """

    def __init__(
        self, assistant: Assistant, cache: FeatureCache, pool: MediaPool, count: Callable[[str], None]
    ) -> None:
        self.assistant, self.cache, self.pool, self.count = assistant, cache, pool, count

    def decode(self, messages: Sequence[Message]) -> dict[Medium, SharedMedium]:
        """The media of a request, decoded and preprocessed. Raises DataError; Busy if those of other requests take up
        all the memory there is for waiting media.
        """
        media: dict[Medium, SharedMedium] = {}
        for medium in media_in(messages):
            if medium not in media:
                media[medium] = self._decode(medium, media.values())
        return media

    def _decode(self, medium: Medium, of_same_request: Collection[SharedMedium]) -> SharedMedium:
        encoder = self.assistant.encoders.get(medium.kind)
        if encoder is None:
            kinds = ", ".join(self.assistant.encoders) or "text only"
            raise DataError(f"this model takes {kinds}, not {medium.kind}")
        content = file_hash(medium.path) if medium.path.is_file() else ""  # decoding reports what isn't a file
        # Models that share an encoder share features.
        shared = self.pool.medium(f"{medium.kind} {id(encoder)} {content}")
        with shared.lock:
            if not shared.decoded and (cached := self.cache.get(shared.name)) is not None:
                shared.layout, shared.features = cached
            if not shared.decoded:
                if self.pool.waiting_bytes(exclude=of_same_request) >= self.pool.limit:
                    raise Busy(RETRY_SECONDS)
                prepared = read_medium(encoder, medium, self.assistant.limits)
                shared.layout, shared.prepared = prepared.layout, prepared
        return shared

    def encode(self, kind: str, medium: SharedMedium) -> Tensor:
        """Features (S, L, W), from the cache or computed now, in the worker's thread."""
        if medium.features is None and (cached := self.cache.get(medium.name)) is not None:
            medium.features = cached[1]
        self.count("media_cache_misses" if medium.features is None else "media_cache_hits")
        if medium.features is None:
            assert medium.prepared is not None and medium.layout is not None
            medium.features = encode_one(self.assistant.encoders[kind], medium.prepared)
            self.cache.put(medium.name, (medium.layout, medium.features), medium.features.nbytes)
        medium.prepared = None
        return medium.features


def read_prompt(
    assistant: Assistant, reader: MediaReader, messages: Sequence[Message], strengths: Mapping[str, float], room: int
) -> RequestPrompt:
    """A conversation as the LLM's input, without media of strength 0. `room`: the most tokens of a prompt.

    Raises DataError for media that can't be read and for a prompt that is too long; Busy as `MediaReader.decode`.
    """
    messages = without_kinds(messages, [kind for kind in strengths if strengths[kind] == 0])
    media = reader.decode(messages)
    segments = assistant.model.placement.segments_by(lambda medium: _layout(media[medium]))
    tokens = tokenize_prompt(messages, assistant.tokenizer, assistant.placeholders, segments)
    length, context = len(tokens.input_ids), context_length(assistant.model.causal_lm)
    if context and length >= context:
        raise DataError(f"a prompt of {length} tokens, but the LLM reads {context}: fewer media, or shorter text")
    if length >= room:
        raise DataError(f"a prompt of {length} tokens, but this server takes {room}: fewer media, or shorter text")
    shown = {kind: [media[medium] for medium in own] for kind, own in by_kind(tokens.media).items()}
    return RequestPrompt(tokens.input_ids, _symbols(assistant, tokens, media, segments), shown, tokens.positions)


def _symbols(
    assistant: Assistant, tokens: Tokens, media: Mapping[Medium, SharedMedium], segments: Segments
) -> list[str]:
    """A placeholder stands for its medium; its position in the medium follows from the tokens before it."""
    placeholder_ids = {placeholder.id for placeholder in assistant.placeholders.values()}
    names = iter([media[medium].name for medium in tokens.media for _, count in segments(medium) for _ in range(count)])
    return [next(names) if token in placeholder_ids else str(token) for token in tokens.input_ids]


class DecodedMedia:
    """The media of a conversation, decoded now and encoded when the worker needs them. Raises as
    `MediaReader.decode`.
    """

    def __init__(self, reader: MediaReader, messages: Sequence[Message]) -> None:
        self._reader = reader
        self._media = reader.decode(messages)

    def layout(self, medium: Medium) -> Layout:
        return _layout(self._media[medium])

    def features(self, medium: Medium) -> Tensor:
        return self._reader.encode(medium.kind, self._media[medium])


def _layout(medium: SharedMedium) -> Layout:
    assert medium.layout is not None  # set by `MediaReader.decode`
    return medium.layout
