"""Vision backbones of transformers: ViT-like (CLIP, SigLIP, DINOv2/v3, ViT, AIMv2, BEiT, I-JEPA, ...) and convolutional
(MobileNetV2, ConvNeXt, ResNet, ...). What differs between them, the class and register tokens and the shape of the
last layer, is read off one pass over a blank picture, so that no list of families is kept here.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.data.sample import Medium
from finetune.errors import ModelError
from finetune.parts import PartOptions

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


@dataclass
class Encoder:
    """A vision backbone. Media are PIL images, RGB; features are rows of the patch grid, top left to bottom right."""

    module: Any
    processor: Any
    options: Options
    fingerprint: str
    width: int = 0
    rows: int = 0  # features per picture: every picture is resized to the same size
    skipped: int = 0  # class and register tokens in front of the patches

    def prepare(self, medium: "Image") -> "torch.Tensor":
        """PIL image, RGB -> float32 pixels (3, height, width) as the backbone's own processor makes them."""
        return self.processor(images=medium, return_tensors="pt")["pixel_values"][0]

    def length(self, medium: Medium) -> int:
        return self.rows

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, 3, height, width) -> features (N, rows, width), in the backbone's dtype."""
        weight = next(self.module.parameters())
        hidden = self._hidden(batch.to(weight.device, weight.dtype))
        return hidden[:, self.skipped :]

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return {
            "options": self.options.model_dump(),
            "config": json.loads(self.module.config.to_json_string(use_diff=False)),
            "processor": json.loads(self.processor.to_json_string()),
        }

    def _hidden(self, pixels: "torch.Tensor") -> "torch.Tensor":
        if self.options.layer == -1:
            hidden = self.module(pixel_values=pixels).last_hidden_state
        else:
            hidden = self.module(pixel_values=pixels, output_hidden_states=True).hidden_states[self.options.layer]
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden

    def _measure(self) -> None:
        """One blank picture through processor and backbone tells width, rows and how many tokens aren't patches."""
        import PIL.Image
        import torch

        pixels = self.prepare(PIL.Image.new("RGB", (64, 64)))[None]
        weight = next(self.module.parameters())
        with torch.no_grad():
            hidden = self._hidden(pixels.to(weight.device, weight.dtype))
        patch = getattr(self.module.config, "patch_size", None)
        total = hidden.shape[1]
        if self.options.tokens == "patches" and isinstance(patch, int):
            grid = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
            # Backbones that merge patches (Swin) end on a smaller grid than they begin with, without extra tokens.
            self.skipped = total - grid if total > grid else 0
        self.width, self.rows = hidden.shape[2], total - self.skipped


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a backbone and its processor, frozen, in evaluation mode.

    Raises ModelError where the name has no vision backbone, or its files can't be read.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    from finetune.hub import loading

    with loading(f"encoder {options.name!r}"):
        config = AutoConfig.from_pretrained(options.name, revision=options.revision)
        config = getattr(config, "vision_config", config)
        processor = AutoImageProcessor.from_pretrained(options.name, revision=options.revision)
        module = AutoModel.from_pretrained(
            options.name, revision=options.revision, config=config, dtype=dtype, use_safetensors=True
        )
    return _finish(module.to(device), processor, options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    import transformers

    config = settings["config"]
    module = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(
            config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
        ),
        dtype=dtype,
    )
    processor_class = getattr(transformers, settings["processor"]["image_processor_type"])
    return _finish(module, processor_class.from_dict(settings["processor"]), Options(**settings["options"]))


def _finish(module: "torch.nn.Module", processor: Any, options: Options) -> Encoder:
    module.eval().requires_grad_(False)
    encoder = Encoder(module, processor, options, fingerprint="")
    try:
        encoder._measure()
    except (TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"encoder {options.name!r} ({type(module).__name__}) doesn't answer like a vision backbone: {error}"
        ) from None
    encoder.fingerprint = _fingerprint(encoder)
    return encoder


def _fingerprint(encoder: Encoder) -> str:
    """sha256 over weights, preprocessing and selection: equal fingerprints give equal features."""
    import torch

    digest = hashlib.sha256()
    settings = encoder.settings()
    settings["options"] = {key: settings["options"][key] for key in ("layer", "tokens")}
    settings["config"].pop("_name_or_path", None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
