"""Encoders that read the wave itself: wav2vec 2.0 (Baevski et al. 2020, https://arxiv.org/abs/2006.11477), HuBERT,
WavLM, data2vec-audio and their like. At the real length of a recording, about 50 rows a second.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import RATE, cut_windows, resampled

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of a wav2vec 2.0, HuBERT, WavLM or data2vec-audio, in safetensors.",
        json_schema_extra={"path": "maybe"},
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")
    layer: int = Field(
        -1, le=-1, description="Layer whose output is taken: -1 the last (after the final norm), -2 the one before."
    )
    window_seconds: float = Field(
        30.0,
        ge=1.0,
        le=120.0,
        description="Seconds heard at once, at most; a longer recording is cut into equal windows, each a segment.",
    )


@dataclass
class Encoder:
    """Media are float32 samples at 16 kHz; features are rows of about 20 milliseconds."""

    module: Any
    processor: Any
    options: Options
    width: int = 0
    fingerprint: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    layout: None = None  # the windows of a recording, and their rows, depend on its length

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples -> windows (S, samples), float32, each normalised as the model's own feature extractor does it."""
        import numpy as np
        import torch

        rate = self.processor.sampling_rate
        longest = int(self.options.window_seconds * rate)
        windows = cut_windows(resampled(decoded, rate), longest, shortest=self._field())
        values = self.processor(list(windows), sampling_rate=rate, return_tensors="np")["input_values"]
        values = torch.from_numpy(np.asarray(values, np.float32))
        return Prepared(values, Layout(self._rows(values.shape[1]), ("",) * len(values)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Windows (N, S, samples) -> features (N, S, L, W), in the module's dtype."""
        return shared.each_segment(batch, self.module, self._hear, at_once=8)

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights."""
        return shared.settings(self.module, self.processor, self.options)

    def _hear(self, windows: "torch.Tensor") -> "torch.Tensor":
        if self.options.layer == -1:
            return self.module(windows).last_hidden_state
        return self.module(windows, output_hidden_states=True).hidden_states[self.options.layer]

    def _convolutions(self) -> list[tuple[int, int]]:
        config = self.module.config
        return list(zip(config.conv_kernel, config.conv_stride, strict=True))

    def _rows(self, samples: int) -> int:
        """Rows of a window, by the arithmetic of the convolutions (and of the adapter behind the last layer)."""
        config = self.module.config
        for kernel, stride in self._convolutions():
            samples = (samples - kernel) // stride + 1
        if self.options.layer == -1 and getattr(config, "add_adapter", False):
            for _ in range(config.num_adapter_layers):
                samples = (samples - 1) // config.adapter_stride + 1
        return samples

    def _field(self) -> int:
        """Samples that the first row sees: what a window must have at least."""
        samples = 1
        for kernel, stride in reversed(self._convolutions()):
            samples = (samples - 1) * stride + kernel
        return samples


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a model and its feature extractor, frozen, in evaluation mode. Raises ModelError."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    from finetune.common.hub import loading

    with loading(f"encoder {options.name!r}"):
        config = AutoConfig.from_pretrained(options.name, revision=options.revision)
        if not hasattr(config, "conv_stride"):
            raise ModelError(
                f"encoder {options.name!r} is of type {config.model_type!r}, which doesn't read the wave itself; "
                "`kind: whisper` reads Whisper, `kind: spectrogram` AST and CLAP"
            )
        processor = AutoFeatureExtractor.from_pretrained(options.name, revision=options.revision)
        module = shared.load(AutoModel, config, options, dtype)
    return _finish(module.to(device), processor, options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    return _finish(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def _finish(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    module.eval().requires_grad_(False)
    encoder = Encoder(module, processor, options)
    prepared = encoder.prepare(np.zeros(RATE // 10, np.float32))
    features = shared.probe(options.name, "a model of waves", module, prepared.values, encoder.encode)
    if features.shape[1] != prepared.layout.rows:
        raise ModelError(
            f"encoder {options.name!r} ({type(module).__name__}) gives {features.shape[1]} rows where its convolutions "
            f"make {prepared.layout.rows}"
        )
    encoder.width = features.shape[2]
    encoder.fingerprint = shared.fingerprint(module, encoder.settings())
    return encoder
