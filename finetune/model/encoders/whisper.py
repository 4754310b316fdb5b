"""The encoder of any Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356) at the true length of a recording:
50 rows per second, instead of 1500 rows however short it is.

The frames are Whisper's own to the bit, including what the last ones contain of the silence behind the recording; only
frames of nothing but that silence are left out. Positions are the first of Whisper's 1500.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import KINDS_OF_SOUND, RATE, WINDOW_SECONDS, cut_windows

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"


class Options(shared.LayerOptions):
    name: str = shared.checkpoint("a Whisper, whole or its encoder alone")
    window_seconds: float = Field(30.0, ge=1.0, le=30.0, description=WINDOW_SECONDS)
    pool: Literal[1, 2] = Field(
        1,
        description="Number of neighbouring rows averaged before the final norm. 2, as in Qwen2-Audio and Audio "
        "Flamingo 3, gives 25 rows per second; with `linear` or `mlp` it fits their classes in other engines.",
    )
    pad_to_30_seconds: bool = Field(
        False, description="Pad every window with silence to 30 seconds, 1500 rows each, as Whisper was trained."
    )


@dataclass
class Encoder(BaseEncoder):
    """Media are float32 samples at 16 kHz, cut into equal windows; features are rows of 20 (or 40) milliseconds."""

    options: Options

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples (n,) -> log-mel frames (S, bins, F), float32; two frames per row, or four if pooled."""
        import torch

        pool, frame = self.options.pool, self.processor.hop_length  # samples
        row = 2 * pool * frame  # samples; the second convolution has stride 2
        longest = self.module.config.max_source_positions // pool * row
        window = min(int(self.options.window_seconds * RATE) // row * row, longest)
        # With pooling, a last row that isn't full is dropped, as in Qwen2-Audio and Audio Flamingo 3.
        windows = cut_windows(decoded, window, unit=row if pool == 1 else frame, shortest=row)
        size = windows.shape[1]
        # Two more frames of silence where Whisper would pad, since the last frames contain some of it.
        padded = longest if self.options.pad_to_30_seconds else min(size + row, longest)
        frames = self.processor(
            list(windows), sampling_rate=RATE, padding="max_length", max_length=padded, return_tensors="np"
        )["input_features"]
        rows = -(-(longest if self.options.pad_to_30_seconds else size) // (2 * frame))  # before pooling
        # With pooling, the convolutions need one more frame of that silence: an odd number of frames marks it.
        values = torch.from_numpy(frames[..., : 2 * rows + (pool > 1)]).float().contiguous()
        return Prepared(values, Layout(rows // pool, ("",) * len(windows)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Frames (N, S, bins, F) -> features (N, S, L, W), in the module's dtype."""
        return shared.each_segment(batch, self.module, self._encode_frames)

    def _encode_frames(self, frames: "torch.Tensor") -> "torch.Tensor":
        """`WhisperEncoder.forward`, which requires 3000 frames, for any number of them; an odd last frame is context
        for the convolutions and makes no row.
        """
        from torch.nn.functional import avg_pool1d, gelu

        module = self.module
        hidden = gelu(module.conv2(gelu(module.conv1(frames)))).transpose(1, 2)[:, : frames.shape[-1] // 2]
        hidden = hidden + module.embed_positions.weight[: hidden.shape[1]]
        for layer in module.layers[: len(module.layers) + 1 + self.options.layer]:
            hidden = layer(hidden, None)
        if self.options.pool > 1:
            hidden = avg_pool1d(hidden.transpose(1, 2), self.options.pool).transpose(1, 2)
        return module.layer_norm(hidden) if self.options.layer == -1 else hidden


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    from transformers import AutoConfig, AutoFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = shared.load_auto(options, AutoConfig)
    if config.model_type != "whisper":
        raise ModelError(f"encoder {options.name!r} is of type {config.model_type!r}, not a Whisper; {KINDS_OF_SOUND}")
    processor = shared.load_auto(options, AutoFeatureExtractor)
    # Whole models keep the encoder's weights under `model.encoder.` or `encoder.`.
    names = {r"^(model\.)?encoder\.": ""}
    return wrap(shared.load(options, WhisperEncoder, config, dtype, device, names), processor, options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return wrap(*shared.rebuild(settings, dtype, WhisperEncoder), Options(**settings["options"]))


def wrap(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    if -options.layer > len(module.layers) + 1:
        raise ModelError(
            f"encoder {options.name!r} has {len(module.layers)} layers; `layer: {options.layer}` doesn't exist: write "
            f"{-len(module.layers) - 1} to -1"
        )
    encoder = Encoder(module, processor, options)
    silence = encoder.prepare(np.zeros(RATE // 10, np.float32)).values
    features = shared.probe(options.name, "the encoder of a Whisper", module, silence, encoder.encode)
    return shared.measured(encoder, features.shape[-1])
