"""From the plain values of a recipe to the parts in memory: the same for training, evaluation and merging."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from finetune import adapter
from finetune.data.features import FeatureStore, media_key
from finetune.data.sample import Medium
from finetune.data.tokenize import Placeholder, add_placeholders
from finetune.language_model import default_device, load_language_model, load_tokenizer, resolve_dtype
from finetune.media import decode
from finetune.model import PLACEHOLDERS, MultimodalModel, compose, placeholder_count
from finetune.parts import load_part


@dataclass
class Parts:
    """What a composite is made of, before the LLM is loaded. `encoders`: {name: (kind, Encoder)}."""

    tokenizer: Any
    placeholders: dict[str, Placeholder]
    encoders: dict[str, tuple[str, Any]]
    projectors: dict[str, tuple[str, Any]]
    fusion: tuple[str, Any]
    dtype: torch.dtype
    device: torch.device


def load_parts(
    *,
    llm: Mapping[str, Any],
    encoders: Mapping[str, tuple[str, Any]],
    projectors: Mapping[str, tuple[str, Any]],
    fusion: tuple[str, Any],
    device: torch.device | None = None,
) -> Parts:
    """Load tokenizer and encoders. `llm`: the recipe's `model.llm` as keywords; the others {name: (kind, Options)}."""
    device = device or default_device()
    dtype = resolve_dtype(llm["dtype"], device)
    tokenizer = load_tokenizer(
        llm["name"],
        revision=llm["revision"],
        chat_template=llm["chat_template"],
        trust_remote_code=llm["trust_remote_code"],
    )
    return Parts(
        tokenizer,
        add_placeholders(tokenizer, sorted(encoders), PLACEHOLDERS),
        {
            name: (kind, load_part("encoders", kind).build(options, dtype, device))
            for name, (kind, options) in encoders.items()
        },
        dict(projectors),
        fusion,
        dtype,
        device,
    )


def build_model(
    parts: Parts, *, llm: Mapping[str, Any], adapter_options: Mapping[str, Any] | None, seed: int, with_encoders: bool
) -> MultimodalModel:
    """Load the LLM, quantized as `llm` says, and put everything together. The same seed gives the same new weights."""
    from transformers import set_seed

    language_model = load_language_model(
        llm["name"],
        revision=llm["revision"],
        quantize=llm["quantize"],
        double_quantize=llm["double_quantize"],
        dtype=parts.dtype,
        attention=llm["attention"],
        device=parts.device,
        trust_remote_code=llm["trust_remote_code"],
    )
    set_seed(seed)
    model = compose(
        language_model,
        encoders=parts.encoders,
        projectors=parts.projectors,
        fusion=parts.fusion,
        placeholder_ids={name: placeholder.id for name, placeholder in parts.placeholders.items()},
        with_encoders=with_encoders,
    )
    if adapter_options is not None:
        adapter.attach(model, **adapter_options)
    return model.eval()


def lengths_of(model_config: Any, encoders: Mapping[str, tuple[str, Any]]) -> Callable[[Medium], int]:
    """Placeholder tokens of a medium, from its encoder, projector and fusion."""
    return lambda medium: placeholder_count(model_config, medium.kind, encoders[medium.kind][1].length(medium))


def encode_one(encoder: Any, prepared: Tensor) -> Tensor:
    """One prepared medium -> its features (L, W)."""
    with torch.no_grad():
        return encoder.encode(prepared[None])[0]


class Features:
    """Media to features, through the cache where there is one. Keeps the seconds spent in decoding and encoding."""

    def __init__(self, encoders: Mapping[str, tuple[str, Any]], cache_folder: Path | None) -> None:
        self.encoders = {name: encoder for name, (_, encoder) in encoders.items()}
        self.stores = (
            {name: FeatureStore(cache_folder, encoder.fingerprint) for name, encoder in self.encoders.items()}
            if cache_folder
            else {}
        )
        self.paths: dict[str, Path] = {}
        self.where: dict[str, str] = {}
        self.seconds = {"decode": 0.0, "encode": 0.0}

    def key(self, medium: Medium, where: str = "") -> str:
        """The medium's name in cache and batches; `where` (file and row) is told if it can't be decoded."""
        key = media_key(medium) if self.stores else str(medium.path)
        self.paths[key] = medium.path
        if where:
            self.where.setdefault(key, f"{where}: {medium.path}")
        return key

    def prepared(self, kind: str, key: str) -> Tensor:
        """Decoded and preprocessed, as the encoder takes it, without batch axis."""
        begin = perf_counter()
        tensor = self.encoders[kind].prepare(decode(kind, self.paths[key], self.where.get(key, "")))
        self.seconds["decode"] += perf_counter() - begin
        return tensor

    def features(self, kind: str, key: str) -> Tensor:
        """(L, W): from the cache, or computed now."""
        store = self.stores.get(kind)
        return self.compute(kind, key)[0] if store is None or store.missing([key]) else store.read(key)

    def compute(self, kind: str, *keys: str) -> list[Tensor]:
        """Features of one or several media, encoded at once."""
        prepared = [self.prepared(kind, key) for key in keys]
        begin = perf_counter()
        with torch.no_grad():
            features = list(self.encoders[kind].encode(torch.stack(prepared)))
        if features[0].is_cuda:
            torch.cuda.synchronize(features[0].device)
        self.seconds["encode"] += perf_counter() - begin
        return features

    def fill(self, kind: str, keys: Sequence[str], done: Callable[[], None], batch: int = 1) -> None:
        """Compute what the cache lacks, `batch` media at once."""
        place = {key: number for number, key in enumerate(keys)}
        ready: dict[str, Tensor] = {}

        def one(key: str) -> Tensor:
            if key not in ready:
                chunk = keys[place[key] : place[key] + batch]
                ready.update(zip(chunk, self.compute(kind, *chunk), strict=True))
            return ready.pop(key)

        self.stores[kind].fill(keys, one, done)

    def missing(self, media: Sequence[Medium]) -> dict[str, list[str]]:
        """{kind: keys that the cache lacks}."""
        keys: dict[str, list[str]] = {}
        for medium in media:
            keys.setdefault(medium.kind, []).append(self.key(medium))
        return {kind: self.stores[kind].missing(found) for kind, found in keys.items() if kind in self.stores}
