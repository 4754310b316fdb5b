"""Media to features: decoded, encoded, kept on disk."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from finetune.common.errors import DataError
from finetune.data.media import Limits, decode, decoding
from finetune.data.rows import listed
from finetune.data.sample import Layout, Medium, Prepared, media_key
from finetune.model.composite import encode_all
from finetune.model.feature_store import FeatureStore


def encode_one(encoder: Any, prepared: Prepared) -> Tensor:
    """One prepared medium -> its features (S, L, W)."""
    with torch.no_grad():
        return encoder.encode(prepared.values[None])[0]


def read_medium(encoder: Any, kind: str, path: Path, limits: Limits, where: str = "") -> Prepared:
    """A file, decoded within limits and as its encoder takes it. Raises MediaError."""
    return encoder.prepare(decode(kind, path, where=where, limits=limits, **encoder.sampling))


def features_key(kind: str, encoder: Any) -> str:
    """sha256: equal where the same file gives the same features."""
    return hashlib.sha256(f"{encoder.fingerprint} {decoding(kind)}".encode()).hexdigest()


class Features:
    """Media to features, through the cache where there is one. Keeps the seconds spent in decoding and encoding."""

    def __init__(
        self, encoders: Mapping[str, tuple[str, Any]], cache_folder: Path | None, limits: Limits | None = None
    ) -> None:
        self.encoders = {name: encoder for name, (_, encoder) in encoders.items()}
        self.stores = (
            {name: FeatureStore(cache_folder, features_key(name, e)) for name, e in self.encoders.items()}
            if cache_folder
            else {}
        )
        self.limits = limits or Limits()
        self.paths: dict[str, Path] = {}
        self.where: dict[str, str] = {}
        self.layouts: dict[tuple[str, str], Layout] = {}
        self.seconds = {"decode": 0.0, "encode": 0.0}

    def refresh(self) -> None:
        """See what another process has put into the cache."""
        for store in self.stores.values():
            store.refresh()

    def key(self, medium: Medium, where: str = "") -> str:
        """The medium's name in cache and batches; `where` (file and row) is told if it can't be decoded."""
        key = media_key(medium)
        self.paths[key] = medium.path
        if where:
            self.where.setdefault(key, f"{where}: {medium.path}")
        return key

    def prepared(self, kind: str, key: str) -> Prepared:
        """Decoded and preprocessed, as the encoder takes it, without batch axis."""
        begin = perf_counter()
        prepared = read_medium(self.encoders[kind], kind, self.paths[key], self.limits, self.where.get(key, ""))
        self.seconds["decode"] += perf_counter() - begin
        return prepared

    def layout(self, medium: Medium) -> Layout:
        """Known without decoding where it is the same for all media, or in the cache."""
        if (always := self.encoders[medium.kind].layout) is not None:
            return always
        key = self.key(medium)
        store = self.stores.get(medium.kind)
        if store is not None and not store.missing([key]):
            return store.layout(key)
        if (medium.kind, key) not in self.layouts:
            self.layouts[medium.kind, key] = self.prepared(medium.kind, key).layout
        return self.layouts[medium.kind, key]

    def features(self, kind: str, key: str) -> Tensor:
        """(S, L, W): from the cache, or computed now."""
        store = self.stores.get(kind)
        if store is None or store.missing([key]):
            return self.compute(kind, [self.prepared(kind, key)])[0]
        return store.read(key)

    def compute(self, kind: str, prepared: Sequence[Prepared], batch: int = 1) -> list[Tensor]:
        """Features of prepared media, up to `batch` of the same shape at once."""
        begin = perf_counter()
        with torch.no_grad():
            features = encode_all(self.encoders[kind], [one.values for one in prepared], batch)
        if features[0].is_cuda:
            torch.cuda.synchronize(features[0].device)
        self.seconds["encode"] += perf_counter() - begin
        return features

    def fill(self, kind: str, keys: Sequence[str], done: Callable[[], None], batch: int = 1, workers: int = 0) -> None:
        """Compute what the cache lacks, `batch` media at once, decoded in `workers` processes.

        Raises DataError with all media that can't be used; what the others gave is kept.
        """
        wrong: list[str] = []

        def computed() -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
            ready: list[tuple[str, Prepared]] = []
            decoding: Any = _Decoding(self, kind, keys)
            loader: Any = DataLoader(decoding, batch_size=None, num_workers=workers)
            for number, (key, prepared, error) in enumerate(loader):
                if error:
                    wrong.append(error)
                else:
                    ready.append((key, prepared))
                if ready and (len(ready) == batch or number == len(keys) - 1):
                    features = self.compute(kind, [one for _, one in ready], batch)
                    for (key, one), found in zip(ready, features, strict=True):
                        yield key, found, one.layout.marks
                    ready.clear()

        self.stores[kind].fill(computed(), done)
        if wrong:
            raise DataError(listed(wrong, f"{len(wrong)} of {len(keys)} media can't be used"))

    def missing(self, media: Sequence[Medium]) -> dict[str, list[str]]:
        """{kind: keys that the cache lacks}."""
        keys: dict[str, list[str]] = {}
        for medium in media:
            keys.setdefault(medium.kind, []).append(self.key(medium))
        return {kind: self.stores[kind].missing(found) for kind, found in keys.items() if kind in self.stores}


class _Decoding:
    """What a data worker does: (key, prepared medium, what is wrong with it)."""

    def __init__(self, features: Features, kind: str, keys: Sequence[str]) -> None:
        self.features, self.kind, self.keys = features, kind, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[str, Prepared | None, str]:
        key = self.keys[number]
        try:
            return key, self.features.prepared(self.kind, key), ""
        except DataError as error:  # as text: across processes an exception would arrive with a traceback in it
            return key, None, str(error)
