"""Vision backbones of transformers: ViT-like (CLIP, SigLIP, DINOv2/v3, ViT, AIMv2, BEiT, I-JEPA, ...) and convolutional
(MobileNetV2, ConvNeXt, ResNet, ...). A picture is one segment, or several tiles and a thumbnail of the whole.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import Shape, cut_tiles, encode_pictures, load_tower, measure

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MEDIUM = "image"


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of a vision backbone (of a CLIP or SigLIP pair, its vision tower is taken).",
        json_schema_extra={"path": "maybe"},
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")
    layer: int = Field(
        -1, le=-1, description="Layer whose output is taken: -1 the last (after the final norm), -2 the one before."
    )
    tokens: Literal["patches", "all"] = Field(
        "patches", description="'patches' drops class and register tokens; 'all' keeps them. Convolutions have none."
    )
    tiles: int = Field(
        1,
        ge=1,
        le=40,
        description="Most tiles that a picture is cut into, for small print and wide pictures; where there are more "
        "than one, a thumbnail of the whole comes first. Each costs as many tokens as a picture; 1: no tiles.",
    )


@dataclass
class Encoder:
    """A vision backbone. Media are PIL images, RGB; features are rows of the patch grid, top left to bottom right."""

    module: Any
    processor: Any
    options: Options
    shape: Shape
    fingerprint: str
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.shape.features

    @property
    def layout(self) -> Layout | None:
        return Layout(self.shape.rows) if self.options.tiles == 1 else None

    def prepare(self, decoded: "Image") -> Prepared:
        """PIL image, RGB -> float32 pixels (S, 3, height, width), as the backbone's own processor makes them."""
        if self.options.tiles == 1:
            pixels = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
        else:
            resample = getattr(self.processor, "resample", None) or 3  # 3: bicubic
            tiles = cut_tiles(decoded, self.shape.width, self.shape.height, self.options.tiles, resample)
            # Tiles have their size: scaling and cropping once more would cut their edges off.
            pixels = self.processor(images=tiles, do_resize=False, do_center_crop=False, return_tensors="pt")
            pixels = pixels["pixel_values"]
        return Prepared(pixels, Layout(self.shape.rows, ("",) * len(pixels)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, S, 3, height, width) -> features (N, S, L, W), in the backbone's dtype."""
        layer, skipped = self.options.layer, self.shape.skipped
        return shared.each_segment(batch, self.module, lambda p: encode_pictures(self.module, p, layer, skipped))

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return shared.settings(self.module, self.processor, self.options)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a backbone and its processor, frozen, in evaluation mode.

    Raises ModelError where the name has no vision backbone, or its files can't be read.
    """
    return _finish(*load_tower(options, dtype, device), options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    return _finish(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def _finish(module: "torch.nn.Module", processor: Any, options: Options) -> Encoder:
    module.eval().requires_grad_(False)
    shape = measure(module, processor, options.name, options.layer, options.tokens == "all")
    fingerprint = shared.fingerprint(module, shared.settings(module, processor, options))
    return Encoder(module, processor, options, shape, fingerprint)
