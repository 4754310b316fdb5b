"""Encoders of a spectrogram of fixed length: AST (Gong et al. 2021, https://arxiv.org/abs/2104.01778; 10.24 s) and the
audio tower of CLAP (Wu et al. 2023, https://arxiv.org/abs/2211.06687; 10 s). For sounds, as Whisper is for speech.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.common.errors import ModelError
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import Encoder as BaseEncoder
from finetune.model.encoders import EncoderSettings
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import KINDS_OF_SOUND, RATE, resampled

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"
AST, CLAP = "audio-spectrogram-transformer", "clap_audio_model"
TOKENS = 2  # of AST, in front of its patches: class and distillation
SHORTEST = 0.1  # seconds: shorter recordings are padded with zeros, shorter remainders of a recording dropped


class Options(shared.PretrainedOptions):
    name: str = shared.checkpoint("an AST or a CLAP (its audio tower is used)")


@dataclass
class Encoder(BaseEncoder):
    """Media are float32 samples at 16 kHz, cut into windows of the model's length, each a segment; features are the
    patches of the spectrogram, ordered by time, then from low to high frequency.
    """

    options: Options
    rows: int = field(init=False)  # L

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples (n,) -> spectrograms by the model's own feature extractor, which pads the last window: float32
        (S, frames, bins) for AST, (S, 1 or 4, frames, bins) for CLAP.
        """
        import numpy as np
        import torch

        rate = self.processor.sampling_rate
        shortest = int(SHORTEST * rate)
        audio = resampled(decoded, rate)
        audio = np.pad(audio, (0, max(shortest - len(audio), 0)))
        size = self._window()
        starts = range(0, max(len(audio) - shortest, 0) + 1, size)
        windows = [audio[start : start + size] for start in starts]
        values = self.processor(windows, sampling_rate=rate, return_tensors="np")[self.module.main_input_name]
        values = torch.from_numpy(np.asarray(values, np.float32))
        return Prepared(values, Layout(self.rows, ("",) * len(windows)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Spectrograms (N, S, ...) -> features (N, S, L, W), in the module's dtype."""
        return shared.each_segment(batch, self.module, self._encode_spectrograms)

    def settings(self) -> EncoderSettings:
        # A CLAP that fuses can't be run, and so not measured, without its weights.
        return {**super().settings(), "rows": self.rows, "width": self.width}

    def _window(self) -> int:
        """Samples of a window."""
        samples: int
        if self.module.config.model_type == CLAP:
            samples = self.processor.nb_max_samples
        else:
            samples = self.processor.max_length * self.processor.sampling_rate // 100  # frames of 10 ms
        return samples

    def _encode_spectrograms(self, spectrograms: "torch.Tensor") -> "torch.Tensor":
        import torch

        if self.module.config.model_type == CLAP:
            # (n, W, frequencies, times). No window is longer than the model's: there is nothing to fuse.
            longer = torch.zeros(len(spectrograms), 1, dtype=torch.bool, device=spectrograms.device)
            grid: torch.Tensor = self.module(input_features=spectrograms, is_longer=longer).last_hidden_state
            return grid.permute(0, 3, 2, 1).flatten(1, 2)
        config = self.module.config
        patches: torch.Tensor = self.module(input_values=spectrograms).last_hidden_state[:, TOKENS:]
        frequencies = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        grid = patches.unflatten(1, (frequencies, -1))
        return grid.transpose(1, 2).flatten(1, 2)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    from transformers import AutoConfig, AutoFeatureExtractor

    config = shared.load_auto(options, AutoConfig)
    config = getattr(config, "audio_config", config)
    if config.model_type not in (AST, CLAP):
        raise ModelError(
            f"encoder {options.name!r} is of type {config.model_type!r}, neither AST nor CLAP; {KINDS_OF_SOUND}"
        )
    processor = shared.load_auto(options, AutoFeatureExtractor)
    # Whole CLAPs keep the tower's weights under `audio_model.`.
    module = shared.load(options, _model_class(config.model_type), config, dtype, device, {r"^audio_model\.": ""})
    return wrap(module, processor, options)


def restore(settings: EncoderSettings, dtype: "torch.dtype") -> Encoder:
    module, processor = shared.rebuild(settings, dtype, _model_class(settings["config"]["model_type"]))
    encoder = Encoder(module, processor, Options(**settings["options"]))
    encoder.rows = settings["rows"]
    return shared.measured(encoder, settings["width"])


def wrap(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    encoder = Encoder(module, processor, options)
    encoder.rows = 0  # not known before the first features
    silence = encoder.prepare(np.zeros(RATE, np.float32)).values
    features = shared.probe(options.name, "an AST or a CLAP", module, silence, encoder.encode)
    encoder.rows = features.shape[1]
    return shared.measured(encoder, features.shape[2])


def _model_class(model_type: str) -> Any:
    from transformers import ASTModel, ClapAudioModel

    return ClapAudioModel if model_type == CLAP else ASTModel
