"""Encoders of a whole clip, sensitive to movement: VideoMAE (Tong et al. 2022, https://arxiv.org/abs/2203.12602) and
V-JEPA 2 (Assran et al. 2025, https://arxiv.org/abs/2506.09985). A few neighbouring frames, mostly two, form a slot of
time; each slot is a segment.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.hub import loading
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._vision import pool_grid, pooled_grid, time_marks

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from finetune.data.media.video import Clip

MEDIUM = "video"
# Keys read from a preprocessor's file. Both models scale, crop and normalise; V-JEPA 2's own class needs torchvision.
PROCESSOR_KEYS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


class Options(shared.PretrainedOptions):
    name: str = shared.checkpoint("a VideoMAE or V-JEPA 2")
    frames: int | None = Field(
        None,
        ge=2,
        description="Frames of a clip, evenly spaced; null: as many as the model was trained with (V-JEPA 2: 64). "
        "VideoMAE takes no other number.",
    )
    pool: int = Field(
        2, ge=0, description="A slot's grid is pooled to pool x pool rows, means of equal regions; 0: all its rows."
    )
    time: bool = Field(True, description="Put the time of each slot's first frame before it as text, like '1.5s '.")


@dataclass
class Encoder(BaseEncoder):
    """Media are `finetune.data.media.video.Clip`. In a clip with too few frames for the model, some are repeated."""

    options: Options
    grid: tuple[int, int] = field(init=False)  # patches of a slot: rows and columns

    @property
    def frames(self) -> int:
        config = self.module.config
        return self.options.frames or getattr(config, "num_frames", None) or config.frames_per_clip

    @property
    def sampling(self) -> dict[str, float]:
        return {"count": self.frames}

    @property
    def layout(self) -> Layout | None:
        return None if self.options.time else self._layout(("",) * self._slots())

    def prepare(self, decoded: "Clip") -> Prepared:
        """Frames -> float32 pixels (T, 3, height, width) for the T frames of the model: the middle frame of each of T
        equal parts of the clip.
        """
        available = len(decoded.frames)
        chosen = [(2 * number + 1) * available // (2 * self.frames) for number in range(self.frames)]
        seconds = tuple(decoded.seconds[index] for index in chosen[:: self.module.config.tubelet_size])
        pixels = self._pixels([decoded.frames[index] for index in chosen])
        return Prepared(pixels, self._layout(time_marks(seconds, self.options.time)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Pixels (N, T, 3, height, width) -> features (N, S, L, W), in the module's dtype; T frames make S slots."""
        import torch

        weight = shared.weight_of(self.module)
        return torch.cat([self._encode_clips(clips.to(weight.device, weight.dtype)) for clips in batch.split(2)])

    def _pixels(self, frames: list["Image"]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.processor(frames, return_tensors="np")["pixel_values"][0]).float()

    def _encode_clips(self, clips: "torch.Tensor") -> "torch.Tensor":
        if self.module.main_input_name == "pixel_values_videos":
            rows = self.module(pixel_values_videos=clips, skip_predictor=True).last_hidden_state
        else:
            rows = self.module(pixel_values=clips).last_hidden_state
        rows = rows.unflatten(1, (self._slots(), self.grid[0] * self.grid[1])).flatten(0, 1)
        pooled: torch.Tensor = pool_grid(rows, self.grid, self.options.pool).unflatten(0, (len(clips), self._slots()))
        return pooled

    def _slots(self) -> int:
        slots: int = self.frames // self.module.config.tubelet_size
        return slots

    def _layout(self, marks: tuple[str, ...]) -> Layout:
        down, across = pooled_grid(self.grid, self.options.pool)
        return Layout(down * across, marks)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    from transformers import AutoConfig, AutoModel

    config = shared.load_auto(options, AutoConfig)
    if config.model_type not in ("videomae", "vjepa2"):
        raise ModelError(
            f"encoder {options.name!r} is of type {config.model_type!r}, neither VideoMAE nor V-JEPA 2; "
            "`kind: video` encodes single frames with any vision backbone"
        )
    processor = _load_processor(options)
    return wrap(shared.load(options, AutoModel, config, dtype, device), processor, options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    return wrap(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def wrap(module: Any, processor: Any, options: Options) -> Encoder:
    import PIL.Image

    encoder = Encoder(module, processor, options)
    tubelet, patch = module.config.tubelet_size, module.config.patch_size
    if encoder.frames % tubelet:
        raise ModelError(f"encoder {options.name!r}: `frames: {encoder.frames}` must be a multiple of {tubelet}")
    black = encoder._pixels([PIL.Image.new("RGB", (64, 64))] * encoder.frames)
    encoder.grid = (black.shape[2] // patch, black.shape[3] // patch)
    features = shared.probe(options.name, "a video transformer", module, black, encoder.encode)
    return shared.measured(encoder, features.shape[2])


def _load_processor(options: Options) -> Any:
    from transformers import VideoMAEImageProcessor
    from transformers.utils import cached_file

    with loading(f"encoder {options.name!r}", options.name) as local_only:
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            file = cached_file(
                options.name,
                name,
                revision=options.revision,
                local_files_only=local_only,
                _raise_exceptions_for_missing_entries=False,
            )
            if file is not None:
                with open(file, encoding="utf-8") as opened:
                    content = json.load(opened)
                return VideoMAEImageProcessor(**{key: content[key] for key in PROCESSOR_KEYS if key in content})
    raise ModelError(f"encoder {options.name!r} has no preprocessor_config.json, which says how frames are scaled")
