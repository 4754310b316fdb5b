"""A clip as single frames: each goes through a vision backbone, its rows are pooled, and its time is written before it
(as in VideoLLaMA 3, Zhang et al. 2025, https://arxiv.org/abs/2501.13106).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import (
    BackboneOptions,
    Shape,
    encode_pictures,
    load_backbone,
    measure,
    pool_grid,
    pooled_grid,
    time_marks,
)

if TYPE_CHECKING:
    import torch

    from finetune.data.media.video import Clip

MEDIUM = "video"


class Options(BackboneOptions):
    frames: int | None = Field(8, ge=1, description="Frames of a clip, evenly spaced; null if `per_second` is set.")
    per_second: float | None = Field(None, gt=0, description="Frames per second, in place of `frames`.")
    pool: int = Field(
        2, ge=0, description="A frame's grid is pooled to pool x pool rows, means of equal regions; 0: all its rows."
    )
    time: bool = Field(True, description="Put each frame's time before it as text, like '1.5s '.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Options":
        if (self.frames is None) == (self.per_second is None):
            raise ValueError("set one of `frames` and `per_second`, the other to null")
        return self


@dataclass
class Encoder(BaseEncoder):
    """Media are `finetune.data.media.video.Clip`; each frame is a segment."""

    options: Options
    shape: Shape

    @property
    def sampling(self) -> dict[str, float]:
        if self.options.per_second is not None:
            return {"per_second": self.options.per_second}
        return {"count": self.options.frames or 0}

    def prepare(self, decoded: "Clip") -> Prepared:
        """Frames -> float32 pixels (S, 3, height, width)."""
        pixels = self.processor(images=list(decoded.frames), return_tensors="pt")["pixel_values"]
        down, across = pooled_grid(self.shape.grid, self.options.pool)
        return Prepared(pixels, Layout(down * across, time_marks(decoded.seconds, self.options.time)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, S, 3, height, width) -> features (N, S, L, W), in the backbone's dtype."""

        def encode_frames(frames: "torch.Tensor") -> "torch.Tensor":
            rows = encode_pictures(self.module, frames, self.options.layer, self.shape.skipped)
            return pool_grid(rows, self.shape.grid, self.options.pool)

        return shared.each_segment(batch, self.module, encode_frames)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    return wrap(*load_backbone(options, dtype, device), options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    return wrap(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def wrap(module: "torch.nn.Module", processor: Any, options: Options) -> Encoder:
    shape = measure(module, processor, options)
    return shared.measured(Encoder(module, processor, options, shape), shape.features)
