"""Vision backbones of transformers: ViT-like (CLIP, SigLIP, DINOv2/v3, ViT, AIMv2, BEiT, I-JEPA, ...) and convolutional
(MobileNetV2, ConvNeXt, ResNet, ...). A picture is one segment, or several tiles and a thumbnail of the whole.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import (
    BackboneOptions,
    Shape,
    cut_tiles,
    encode_pictures,
    load_backbone,
    measure,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MEDIUM = "image"


class Options(BackboneOptions):
    tokens: Literal["patches", "all"] = Field(
        "patches", description="'patches' drops class and register tokens, 'all' keeps them. Convolutions have none."
    )
    tiles: int = Field(
        1,
        ge=1,
        le=40,
        description="Maximum number of tiles that a picture is cut into, for small print and wide pictures; before two "
        "or more comes a thumbnail of the whole. Each takes as many tokens as a picture; 1: no tiles.",
    )


@dataclass
class Encoder(BaseEncoder):
    """Media are PIL pictures, RGB; features are the patches of a picture or tile, row by row from the top left."""

    options: Options
    shape: Shape

    @property
    def layout(self) -> Layout | None:
        return Layout(self.shape.rows) if self.options.tiles == 1 else None

    def prepare(self, decoded: "Image") -> Prepared:
        """PIL picture, RGB -> float32 pixels (S, 3, height, width), by the backbone's own processor."""
        if self.options.tiles == 1:
            pixels = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
        else:
            resample = getattr(self.processor, "resample", None) or 3  # 3: bicubic
            tiles = cut_tiles(decoded, self.shape.width, self.shape.height, self.options.tiles, resample)
            # Tiles have their final size: scaling and cropping them again would cut off their edges.
            pixels = self.processor(images=tiles, do_resize=False, do_center_crop=False, return_tensors="pt")
            pixels = pixels["pixel_values"]
        return Prepared(pixels, Layout(self.shape.rows, ("",) * len(pixels)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, S, 3, height, width) -> features (N, S, L, W), in the backbone's dtype."""
        layer, skipped = self.options.layer, self.shape.skipped
        return shared.each_segment(batch, self.module, lambda p: encode_pictures(self.module, p, layer, skipped))


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    return wrap(*load_backbone(options, dtype, device), options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    return wrap(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def wrap(module: "torch.nn.Module", processor: Any, options: Options) -> Encoder:
    shape = measure(module, processor, options, options.tokens == "all")
    return shared.measured(Encoder(module, processor, options, shape), shape.features)
