"""Encoders turn media into features and are frozen unless a recipe tunes them. One file per kind of interface, not per
brand. Each file is an `EncoderContract` and imports no torch at module level.

Shapes: N media, each of S segments of L rows of width W.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol

from typing_extensions import TypedDict  # pydantic takes no other one before Python 3.12

from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Medium, Prepared, Values
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    import torch


class EncoderSettings(TypedDict):
    """Everything but the weights, as JSON: what `restore` rebuilds an encoder from, without its original folder."""

    options: dict[str, Any]
    config: dict[str, Any]
    processor: dict[str, Any]
    rows: NotRequired[int]  # the last two where they can only be measured with the weights in place
    width: NotRequired[int]


@dataclass
class Encoder(ABC):
    """A loaded encoder. Each part's file defines its own, with `prepare` and `encode`: `type(encoder).__module__` names
    its kind.
    """

    module: Any  # the torch.nn.Module that holds the weights
    processor: Any  # of its media, by transformers
    options: PartOptions
    width: int = field(init=False)  # W
    fingerprint: str = field(init=False)  # sha256 of weights, preprocessing and options: equal ones mean equal features

    @property
    def sampling(self) -> dict[str, float]:
        """Keyword arguments of `data.media.decode`: which frames of a video to read. Empty for other media."""
        return {}

    @property
    def layout(self) -> Layout | None:
        """The layout of every medium; None if it depends on the medium."""
        return None

    def layout_at(self, medium: Medium, limits: Limits) -> Layout | None:
        """The layout of one medium by the header of its file; None where decoding is needed. Raises MediaError."""
        return None

    @abstractmethod
    def prepare(self, decoded: Any) -> Prepared:
        """A decoded medium -> float32 values on the CPU, without batch axis, and their layout. Runs in data workers."""

    @abstractmethod
    def encode(self, batch: Any) -> "torch.Tensor":
        """Stacked `Prepared.values` (N, ...), or named ones of one medium -> features (N, S, L, W) as their layout
        says, in the module's dtype and on its device.
        """

    def settings(self) -> EncoderSettings:
        """What `restore` rebuilds the encoder from."""
        return {
            "options": self.options.model_dump(),
            "config": json.loads(self.module.config.to_json_string(use_diff=False)),
            "processor": json.loads(self.processor.to_json_string()),
        }


def together(values: Sequence[Values]) -> Values:
    """Values of the same shapes as one batch; named ones are a batch of one already, and come alone."""
    import torch

    first = values[0]
    return first if isinstance(first, Mapping) else torch.stack([one for one in values if not isinstance(one, Mapping)])


def encode_all(encoder: Encoder, media: Sequence[Values], batch: int) -> list["torch.Tensor"]:
    """Prepared media -> features, each (S, L, W), in their order; up to `batch` of the same shape at once. All are
    computed when it returns, also on an accelerator.
    """
    import torch

    features: list[torch.Tensor] = []
    for shape, alike in groupby(media, lambda medium: None if isinstance(medium, Mapping) else medium.shape):
        while group := list(islice(alike, 1 if shape is None else batch)):
            features.extend(encoder.encode(together(group)))
    if features and features[0].is_cuda:
        torch.cuda.synchronize(features[0].device)
    return features


class EncoderContract(Protocol):
    """What the file of an encoder defines."""

    MEDIUM: Literal["image", "audio", "video"]
    Options: type[PartOptions]

    def build(self, options: Any, dtype: "torch.dtype", device: "torch.device") -> Encoder:
        """Load the checkpoint that the options name, frozen, in evaluation mode. Raises ModelError."""

    def restore(self, settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
        """Rebuild an encoder from `Encoder.settings()`, frozen; its weights are still to be loaded."""

    def wrap(self, module: Any, processor: Any, options: Any) -> Encoder:
        """An encoder of a loaded module and the processor of its media; both functions above end here. Raises
        ModelError if the module doesn't answer as this kind of model does.
        """
