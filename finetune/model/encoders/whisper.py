"""The encoder of any Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356), at the real length of a
recording: 50 rows a second, instead of 1500 rows however short it is.

The frames are those of Whisper's own features, to the bit: what a frame tells of the silence behind the recording is
kept, only the frames of nothing but that silence are left out, and the positions are the first of the 1500.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import RATE, cut_windows

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of a Whisper, whole or only its encoder, in safetensors.",
        json_schema_extra={"path": "maybe"},
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")
    layer: int = Field(
        -1, le=-1, description="Layer whose output is taken: -1 the last (after the final norm), -2 the one before."
    )
    window_seconds: float = Field(
        30.0,
        ge=1.0,
        le=30.0,
        description="Seconds heard at once, at most; a longer recording is cut into equal windows, each a segment.",
    )
    pool: Literal[1, 2] = Field(
        1,
        description="Neighbouring rows that are averaged before the final norm; 2 is what Qwen2-Audio and Audio "
        "Flamingo 3 do, whose classes in other engines then fit, with `linear` or `mlp`: 25 rows a second.",
    )
    pad_to_30_seconds: bool = Field(
        False, description="Silence behind every window up to 30 seconds, 1500 rows each, as Whisper was trained."
    )


@dataclass
class Encoder:
    """Media are float32 samples at 16 kHz; features are rows of 20 milliseconds."""

    module: Any
    processor: Any
    options: Options
    fingerprint: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    layout: None = None  # the windows of a recording, and their rows, depend on its length

    @property
    def width(self) -> int:
        return self.module.config.d_model

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples -> log-mel frames (S, bins, F), float32; two or, pooled, four of them a row."""
        import torch

        pool, frame = self.options.pool, self.processor.hop_length  # samples
        row = 2 * pool * frame  # the second convolution takes every other frame
        longest = self.module.config.max_source_positions // pool * row
        window = min(int(self.options.window_seconds * RATE) // row * row, longest)
        # Pooled, what doesn't fill a row is heard but isn't one, as Qwen2-Audio and Audio Flamingo 3 count.
        windows = cut_windows(decoded, window, unit=row if pool == 1 else frame, shortest=row)
        size = windows.shape[1]
        # Two frames more, where Whisper would pad: what the last ones tell of the silence that follows.
        padded = longest if self.options.pad_to_30_seconds else min(size + row, longest)
        frames = self.processor(
            list(windows), sampling_rate=RATE, padding="max_length", max_length=padded, return_tensors="np"
        )["input_features"]
        heard = -(-(longest if self.options.pad_to_30_seconds else size) // (2 * frame))  # rows before they are pooled
        # Pooled, the convolutions see one frame more of that silence: an odd number tells that it is only seen.
        values = torch.from_numpy(frames[..., : 2 * heard + (pool > 1)]).float().contiguous()
        return Prepared(values, Layout(heard // pool, ("",) * len(windows)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Frames (N, S, bins, F) -> features (N, S, L, W), in the module's dtype."""
        return shared.each_segment(batch, self.module, self._hear)

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return shared.settings(self.module, self.processor, self.options)

    def _hear(self, frames: "torch.Tensor") -> "torch.Tensor":
        """`WhisperEncoder.forward`, which takes 3000 frames and nothing else, for any number; an odd last one is only
        seen by the convolutions.
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
    """Load the encoder of a Whisper, frozen, in evaluation mode. Raises ModelError."""
    from transformers import AutoConfig, AutoFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from finetune.common.hub import loading

    with loading(f"encoder {options.name!r}"):
        config = AutoConfig.from_pretrained(options.name, revision=options.revision)
        if config.model_type != "whisper":
            raise ModelError(
                f"encoder {options.name!r} is of type {config.model_type!r}, no Whisper; `kind: wave` reads wav2vec2, "
                "HuBERT and WavLM, `kind: spectrogram` AST and CLAP"
            )
        processor = AutoFeatureExtractor.from_pretrained(options.name, revision=options.revision)
        # Whole models keep the encoder's weights under `model.encoder.` or `encoder.`.
        names = {r"^(model\.)?encoder\.": ""}
        module = shared.load(WhisperEncoder, config, options, dtype, key_mapping=names)
    return _finish(module.to(device), processor, options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return _finish(*shared.rebuild(settings, dtype, WhisperEncoder), Options(**settings["options"]))


def _finish(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    if -options.layer > len(module.layers) + 1:
        raise ModelError(f"encoder {options.name!r} has {len(module.layers)} layers; `layer: {options.layer}` is none")
    module.eval().requires_grad_(False)
    encoder = Encoder(module, processor, options)
    silence = encoder.prepare(np.zeros(RATE // 10, np.float32)).values
    shared.probe(options.name, "the encoder of a Whisper", module, silence, encoder.encode)
    encoder.fingerprint = shared.fingerprint(module, encoder.settings())
    return encoder
