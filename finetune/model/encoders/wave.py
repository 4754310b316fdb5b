"""Encoders of the waveform itself: wav2vec 2.0 (Baevski et al. 2020, https://arxiv.org/abs/2006.11477), HuBERT, WavLM,
data2vec-audio and the like, at the true length of a recording: about 50 rows per second.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import KINDS_OF_SOUND, RATE, WINDOW_SECONDS, cut_windows, resampled

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"


class Options(shared.LayerOptions):
    name: str = shared.checkpoint("a wav2vec 2.0, HuBERT, WavLM or data2vec-audio")
    window_seconds: float = Field(30.0, ge=1.0, le=120.0, description=WINDOW_SECONDS)


@dataclass
class Encoder(BaseEncoder):
    """Media are float32 samples at 16 kHz, cut into equal windows; features are rows of about 20 milliseconds."""

    options: Options

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples (n,) -> windows (S, samples), float32, normalised by the model's own feature extractor."""
        import numpy as np
        import torch

        rate = self.processor.sampling_rate
        longest = int(self.options.window_seconds * rate)
        windows = cut_windows(resampled(decoded, rate), longest, shortest=self._receptive_field())
        values = self.processor(list(windows), sampling_rate=rate, return_tensors="np")["input_values"]
        values = torch.from_numpy(np.asarray(values, np.float32))
        return Prepared(values, Layout(self._rows(values.shape[1]), ("",) * len(values)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Windows (N, S, samples) -> features (N, S, L, W), in the module's dtype."""
        module, layer = self.module, self.options.layer
        return shared.each_segment(
            batch, module, lambda windows: shared.hidden_states(module, layer, input_values=windows), at_once=8
        )

    def _convolutions(self) -> list[tuple[int, int]]:
        """(kernel, stride) of each."""
        config = self.module.config
        return list(zip(config.conv_kernel, config.conv_stride, strict=True))

    def _rows(self, samples: int) -> int:
        """Rows of a window, by the arithmetic of the convolutions and of the adapter behind the last layer."""
        config = self.module.config
        for kernel, stride in self._convolutions():
            samples = (samples - kernel) // stride + 1
        if self.options.layer == -1 and getattr(config, "add_adapter", False):
            for _ in range(config.num_adapter_layers):
                samples = (samples - 1) // config.adapter_stride + 1
        return samples

    def _receptive_field(self) -> int:
        """Samples that the first row depends on: the least that a window must have."""
        samples = 1
        for kernel, stride in reversed(self._convolutions()):
            samples = (samples - 1) * stride + kernel
        return samples


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    config = shared.load_auto(options, AutoConfig)
    if not hasattr(config, "conv_stride"):
        raise ModelError(
            f"encoder {options.name!r} is of type {config.model_type!r}, which doesn't read waveforms; {KINDS_OF_SOUND}"
        )
    processor = shared.load_auto(options, AutoFeatureExtractor)
    return wrap(shared.load(options, AutoModel, config, dtype, device), processor, options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    return wrap(*shared.rebuild(settings, dtype), Options(**settings["options"]))


def wrap(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    encoder = Encoder(module, processor, options)
    silence = encoder.prepare(np.zeros(RATE // 10, np.float32))
    _, rows, width = shared.probe(options.name, "a model of waveforms", module, silence.values, encoder.encode).shape
    if rows != silence.layout.rows:
        raise ModelError(
            f"encoder {options.name!r} ({type(module).__name__}) gives {rows} rows where its convolutions make "
            f"{silence.layout.rows}"
        )
    return shared.measured(encoder, width)
