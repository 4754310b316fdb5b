"""Encoders that see movement, a clip at once: VideoMAE (Tong et al. 2022, https://arxiv.org/abs/2203.12602) and V-JEPA
2 (Assran et al. 2025, https://arxiv.org/abs/2506.09985). Neighbouring frames, mostly two, make a slot of time; each
slot is a segment.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import pool_grid, pooled_grid, time_marks

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from finetune.data.media.video import Clip

MEDIUM = "video"
# What a folder's processor is read for. Both kinds scale, crop and normalise; V-JEPA 2's own class needs torchvision.
PROCESSOR_KEYS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of a VideoMAE or V-JEPA 2, in safetensors.", json_schema_extra={"path": "maybe"}
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")
    frames: int | None = Field(
        None,
        ge=2,
        description="Frames of a clip, evenly spread; null: what the model was trained with (V-JEPA 2: 64). "
        "VideoMAE takes no other number.",
    )
    pool: int = Field(
        2, ge=0, description="A slot's grid becomes pool x pool rows, means of equal regions; 0: all its rows."
    )
    time: bool = Field(True, description="Text before each slot: the time of its first frame, as '1.5s '.")


@dataclass
class Encoder:
    """Media are `finetune.data.media.video.Clip`. One with fewer frames than the model takes repeats some."""

    module: Any
    processor: Any
    options: Options
    grid: tuple[int, int] = (0, 0)  # patches of a slot: rows and columns
    width: int = 0
    fingerprint: str = ""

    @property
    def frames(self) -> int:
        config = self.module.config
        return self.options.frames or getattr(config, "num_frames", None) or config.frames_per_clip

    @property
    def sampling(self) -> dict[str, Any]:
        return {"count": self.frames}

    @property
    def layout(self) -> Layout | None:
        return None if self.options.time else self._layout(("",) * self._slots())

    def prepare(self, decoded: "Clip") -> Prepared:
        """Frames -> float32 pixels (T, 3, height, width), T as many as the model takes: of each of T equal parts of
        the clip, the middle frame.
        """
        have = len(decoded.frames)
        taken = [(2 * number + 1) * have // (2 * self.frames) for number in range(self.frames)]
        seconds = tuple(decoded.seconds[index] for index in taken[:: self.module.config.tubelet_size])
        pixels = self._pixels([decoded.frames[index] for index in taken])
        return Prepared(pixels, self._layout(time_marks(seconds, self.options.time)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, T, 3, height, width) -> features (N, S, L, W), in the module's dtype; S slots of T frames."""
        import torch

        weight = shared.weight_of(self.module)
        return torch.cat([self._see(clip.to(weight.device, weight.dtype)) for clip in batch.split(2)])

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return shared.settings(self.module, self.processor, self.options)

    def _pixels(self, frames: list["Image"]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.processor(frames, return_tensors="np")["pixel_values"][0]).float()

    def _see(self, clips: "torch.Tensor") -> "torch.Tensor":
        if self.module.main_input_name == "pixel_values_videos":
            rows = self.module(pixel_values_videos=clips, skip_predictor=True).last_hidden_state
        else:
            rows = self.module(pixel_values=clips).last_hidden_state
        rows = rows.unflatten(1, (self._slots(), self.grid[0] * self.grid[1])).flatten(0, 1)
        return pool_grid(rows, self.grid, self.options.pool).unflatten(0, (len(clips), self._slots()))

    def _slots(self) -> int:
        return self.frames // self.module.config.tubelet_size

    def _layout(self, marks: tuple[str, ...]) -> Layout:
        down, across = pooled_grid(self.grid, self.options.pool)
        return Layout(down * across, marks)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a model and the figures of its processor, frozen, in evaluation mode. Raises ModelError."""
    from transformers import AutoConfig, AutoModel, VideoMAEImageProcessor
    from transformers.utils import cached_file

    from finetune.common.hub import loading

    with loading(f"encoder {options.name!r}"):
        config = AutoConfig.from_pretrained(options.name, revision=options.revision)
        if config.model_type not in ("videomae", "vjepa2"):
            raise ModelError(
                f"encoder {options.name!r} is of type {config.model_type!r}, neither VideoMAE nor V-JEPA 2; "
                "`kind: video` takes single frames through any vision backbone"
            )
        file = None
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            file = file or cached_file(
                options.name, name, revision=options.revision, _raise_exceptions_for_missing_entries=False
            )
        if file is None:
            raise ModelError(
                f"encoder {options.name!r} has no preprocessor_config.json: how to scale frames is unknown"
            )
        with open(file, encoding="utf-8") as opened:
            figures = json.load(opened)
        processor = VideoMAEImageProcessor(**{key: figures[key] for key in PROCESSOR_KEYS if key in figures})
        module = shared.load(AutoModel, config, options, dtype)
    return _finish(module.to(device), processor, options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    return _finish(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def _finish(module: Any, processor: Any, options: Options) -> Encoder:
    import PIL.Image

    module.eval().requires_grad_(False)
    encoder = Encoder(module, processor, options)
    tubelet, patch = module.config.tubelet_size, module.config.patch_size
    if encoder.frames % tubelet:
        raise ModelError(f"encoder {options.name!r}: `frames: {encoder.frames}` must be a multiple of {tubelet}")
    black = encoder._pixels([PIL.Image.new("RGB", (64, 64))] * encoder.frames)
    encoder.grid = (black.shape[2] // patch, black.shape[3] // patch)
    features = shared.probe(options.name, "a video transformer", module, black, encoder.encode)
    encoder.width = features.shape[2]
    encoder.fingerprint = shared.fingerprint(module, encoder.settings())
    return encoder
