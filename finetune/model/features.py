"""Media to features: decoded, encoded, kept on disk."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from finetune.common.errors import DataError
from finetune.common.memory import ENCODING, Halving
from finetune.data.media import decode, decoding
from finetune.data.rows import error_list
from finetune.data.sample import Layout, Medium, Prepared
from finetune.model.encoders import Encoder, encode_all, together
from finetune.model.feature_store import FeatureStore
from finetune.recipe.schema import Limits


class UnreadableMedia(DataError):
    """`reasons`: {(kind, key of a medium): why it can't be used, without a row's place}."""

    def __init__(self, message: str, reasons: Mapping[tuple[str, str], str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class MediaView(Protocol):
    """How media are shown to a model: the layout of one, and its features (S, L, W)."""

    def layout(self, medium: Medium) -> Layout: ...

    def features(self, medium: Medium) -> Tensor: ...


def encode_one(encoder: Encoder, prepared: Prepared) -> Tensor:
    """One prepared medium -> its features (S, L, W)."""
    with torch.no_grad():
        return encoder.encode(together([prepared.values]))[0]


def decode_for(encoder: Encoder, kind: str, source: object, limits: Limits, where: str = "") -> Any:
    """As `decode`, with the frames of a video that the encoder reads. Raises MediaError."""
    return decode(kind, source, where=where, limits=limits, **encoder.sampling)


def read_medium(encoder: Encoder, medium: Medium, limits: Limits) -> Prepared:
    """A file, decoded within limits and prepared for its encoder. Raises MediaError."""
    source = medium.path if medium.content is None else medium.content
    return encoder.prepare(decode_for(encoder, medium.kind, source, limits, medium.place))


def features_key(kind: str, encoder: Encoder, limits: Limits) -> str:
    """sha256: equal where the same file gives the same features."""
    size = "" if kind == "audio" or limits.shrink_to_pixels is None else f" {limits.shrink_to_pixels} pixels"
    return hashlib.sha256(f"{encoder.fingerprint} {decoding(kind)}{size}".encode()).hexdigest()


class Features:
    """The media's own features, through the cache where there is one. Counts seconds spent decoding and encoding.

    `encoders`: {medium: a built encoder}.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], cache_folder: Path | None, limits: Limits | None = None
    ) -> None:
        self.encoders = dict(encoders)
        self.limits = limits or Limits()
        self.stores = (
            {
                name: FeatureStore(cache_folder, features_key(name, encoder, self.limits))
                for name, encoder in self.encoders.items()
            }
            if cache_folder
            else {}
        )
        self.seconds = {"decode": 0.0, "encode": 0.0}
        self._halving = {kind: Halving(f"encoding {kind}", "train.encode_batch", ENCODING) for kind in self.encoders}
        self._layouts: dict[tuple[str, str], Layout] = {}

    def refresh(self) -> None:
        """Read the index again: another process may have filled the cache."""
        for store in self.stores.values():
            store.refresh()

    def prepared(self, medium: Medium) -> Prepared:
        """Decoded and preprocessed for its encoder, without batch axis."""
        begin = perf_counter()
        prepared = read_medium(self.encoders[medium.kind], medium, self.limits)
        self.seconds["decode"] += perf_counter() - begin
        return prepared

    def layout(self, medium: Medium) -> Layout:
        """Known without decoding where it is the same for all media, in the file's header, or in the cache."""
        if (always := self.encoders[medium.kind].layout) is not None:
            return always
        store = self.stores.get(medium.kind)
        if store is not None and not store.missing([medium.key]):
            return store.layout(medium.key)
        content = (medium.kind, medium.key)
        if content not in self._layouts:
            known = self.encoders[medium.kind].layout_at(medium, self.limits)
            self._layouts[content] = known or self.prepared(medium).layout
        return self._layouts[content]

    def features(self, medium: Medium) -> Tensor:
        """(S, L, W): from the cache, or computed now."""
        store = self.stores.get(medium.kind)
        if store is None or store.missing([medium.key]):
            return self.compute(medium.kind, [self.prepared(medium)])[0]
        return store.read(medium.key)

    def compute(self, kind: str, prepared: Sequence[Prepared], batch: int = 1) -> list[Tensor]:
        """Features of prepared media, up to `batch` of the same shape at once, or fewer where memory runs out. Raises
        OutOfMemory.
        """
        begin, encoder = perf_counter(), self.encoders[kind]

        def encoded(some: Sequence[Prepared]) -> list[Tensor]:
            return encode_all(encoder, [one.values for one in some], batch)

        with torch.no_grad():
            features = [rows for _, rows in self._halving[kind].over(prepared, batch, encoded)]
        self.seconds["encode"] += perf_counter() - begin
        return features

    def fill(self, media: Sequence[Medium], done: Callable[[], None], batch: int = 1, workers: int = 0) -> None:
        """Compute and keep the features of media of one kind, `batch` at once, decoded in `workers` processes.

        Raises UnreadableMedia with all that can't be used; the features of the others are kept.
        """
        kind = media[0].kind
        wrong: list[str] = []
        reasons: dict[tuple[str, str], str] = {}

        def computed() -> Iterator[tuple[str, Tensor, Layout]]:
            waiting: list[tuple[Medium, Prepared]] = []
            loader: Any = DataLoader(_Decoding(self, media), batch_size=None, num_workers=workers)
            for number, prepared in enumerate(loader):
                if isinstance(prepared, str):
                    wrong.append(prepared)
                    reasons[kind, media[number].key] = prepared.removeprefix(f"{media[number].where}: ")
                else:
                    waiting.append((media[number], prepared))
                if waiting and (len(waiting) == batch or number == len(media) - 1):
                    features = self.compute(kind, [prepared for _, prepared in waiting], batch)
                    for (medium, prepared), rows in zip(waiting, features, strict=True):
                        yield medium.key, rows, prepared.layout
                    waiting.clear()

        self.stores[kind].fill(computed(), done)
        if wrong:
            headline = f"{len(wrong)} of {len(media)} media can't be used"
            raise UnreadableMedia(error_list(wrong, headline), reasons)

    def known(self, kind: str, key: str) -> bool:
        """Whether the cache has the features of a medium, or keeps none of its kind."""
        return kind not in self.stores or key in self.stores[kind]

    def check(self, media: Iterable[tuple[str, str]]) -> None:
        """Remove files of the cache that hold features of these media, (kind, key), and are damaged."""
        named = list(media)
        for kind, store in self.stores.items():
            store.check(key for other, key in named if other == kind)

    def missing(self, media: Sequence[Medium]) -> dict[str, list[Medium]]:
        """{kind: media whose features the cache lacks, each content once}."""
        kinds: dict[str, dict[str, Medium]] = {}
        for medium in media:
            kinds.setdefault(medium.kind, {}).setdefault(medium.key, medium)
        return {
            kind: [by_key[key] for key in self.stores[kind].missing(by_key)]
            for kind, by_key in kinds.items()
            if kind in self.stores
        }


class _Decoding(torch.utils.data.Dataset[Prepared | str]):
    """The work of a data worker: decode and prepare medium number n, or say what is wrong with it."""

    def __init__(self, features: Features, media: Sequence[Medium]) -> None:
        self.features, self.media = features, media

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, number: int) -> Prepared | str:
        try:
            return self.features.prepared(self.media[number])
        except DataError as error:  # as text: across processes an exception would arrive with a traceback in it
            return str(error)
