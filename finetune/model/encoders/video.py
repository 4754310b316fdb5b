"""A clip as single frames, each through a vision backbone, its rows pooled, its time told in the text before it (as in
VideoLLaMA 3, Zhang et al. 2025, https://arxiv.org/abs/2501.13106).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import (
    Shape,
    encode_pictures,
    load_tower,
    measure,
    pool_grid,
    pooled_grid,
    time_marks,
)

if TYPE_CHECKING:
    import torch

    from finetune.data.media.video import Clip

MEDIUM = "video"


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of a vision backbone (of a CLIP or SigLIP pair, its vision tower is taken).",
        json_schema_extra={"path": "maybe"},
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")
    layer: int = Field(
        -1, le=-1, description="Layer whose output is taken: -1 the last (after the final norm), -2 the one before."
    )
    frames: int | None = Field(
        8, ge=1, description="Frames of a clip, evenly spread over it; null where `per_second` is set."
    )
    per_second: float | None = Field(None, gt=0, description="Frames a second, in place of `frames`.")
    pool: int = Field(
        2, ge=0, description="A frame's grid becomes pool x pool rows, means of equal regions; 0: all its rows."
    )
    time: bool = Field(True, description="Text before each frame: its time, as '1.5s '.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Options":
        if (self.frames is None) == (self.per_second is None):
            raise ValueError("set one of `frames` and `per_second`, the other to null")
        return self


@dataclass
class Encoder:
    """A vision backbone over frames. Media are `finetune.data.media.video.Clip`; a frame is a segment."""

    module: Any
    processor: Any
    options: Options
    shape: Shape
    fingerprint: str
    layout: None = None  # frames depend on the clip

    @property
    def width(self) -> int:
        return self.shape.features

    @property
    def sampling(self) -> dict[str, Any]:
        if self.options.frames is not None:
            return {"count": self.options.frames}
        return {"per_second": self.options.per_second}

    def prepare(self, decoded: "Clip") -> Prepared:
        """Frames -> float32 pixels (S, 3, height, width)."""
        pixels = self.processor(images=list(decoded.frames), return_tensors="pt")["pixel_values"]
        down, across = pooled_grid(self.shape.grid, self.options.pool)
        return Prepared(pixels, Layout(down * across, time_marks(decoded.seconds, self.options.time)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, S, 3, height, width) -> features (N, S, L, W), in the backbone's dtype."""

        def see(frames: "torch.Tensor") -> "torch.Tensor":
            rows = encode_pictures(self.module, frames, self.options.layer, self.shape.skipped)
            return pool_grid(rows, self.shape.grid, self.options.pool)

        return shared.each_segment(batch, self.module, see)

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return shared.settings(self.module, self.processor, self.options)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a backbone and its processor, frozen, in evaluation mode. Raises ModelError."""
    return _finish(*load_tower(options, dtype, device), options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    return _finish(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def _finish(module: "torch.nn.Module", processor: Any, options: Options) -> Encoder:
    module.eval().requires_grad_(False)
    shape = measure(module, processor, options.name, options.layer)
    fingerprint = shared.fingerprint(module, shared.settings(module, processor, options))
    return Encoder(module, processor, options, shape, fingerprint)
