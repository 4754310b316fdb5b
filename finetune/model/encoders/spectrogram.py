"""Encoders of a spectrogram of fixed length: AST (Gong et al. 2021, https://arxiv.org/abs/2104.01778; 10.24 s) and the
audio tower of CLAP (Wu et al. 2023, https://arxiv.org/abs/2211.06687; 10 s). For sounds, where Whisper is for speech.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.data.sample import Layout, Prepared
from finetune.model.encoders import _transformers as shared
from finetune.model.encoders._audio import RATE, resampled

if TYPE_CHECKING:
    import numpy as np
    import torch

MEDIUM = "audio"
AST, CLAP = "audio-spectrogram-transformer", "clap_audio_model"
TOKENS = 2  # of AST, in front of its patches: class and distillation
SHORTEST = 0.1  # seconds: what is shorter is filled up with zeros, a remainder that is shorter is left out


class Options(PartOptions):
    name: str = Field(
        description="Hub id or folder of an AST or a CLAP (of which the audio tower is taken), in safetensors.",
        json_schema_extra={"path": "maybe"},
    )
    revision: str | None = Field(None, description="Commit of the hub repository, 40 hex digits.")


@dataclass
class Encoder:
    """Media are float32 samples at 16 kHz, cut into windows of the model's length, each a segment; features are the
    spectrogram's patches, from first to last, of the same moment from low to high.
    """

    module: Any
    processor: Any
    options: Options
    rows: int = 0
    width: int = 0
    fingerprint: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    layout: None = None  # the windows of a recording depend on its length

    def prepare(self, decoded: "np.ndarray") -> Prepared:
        """Samples -> spectrograms as the model's own feature extractor makes them (and fills them up, the last one of
        a recording): float32 (S, frames, bins) for AST, (S, 1 or 4, frames, bins) for CLAP.
        """
        import numpy as np
        import torch

        rate = self.processor.sampling_rate
        size = self._window()
        least = int(SHORTEST * rate)
        audio = resampled(decoded, rate)
        audio = np.pad(audio, (0, max(least - len(audio), 0)))
        starts = range(0, max(len(audio) - least, 0) + 1, size)
        windows = [audio[start : start + size] for start in starts]
        values = self.processor(windows, sampling_rate=rate, return_tensors="np")[self.module.main_input_name]
        values = torch.from_numpy(np.asarray(values, np.float32))
        return Prepared(values, Layout(self.rows, ("",) * len(windows)))

    def encode(self, batch: "torch.Tensor") -> "torch.Tensor":
        """Spectrograms (N, S, ...) -> features (N, S, L, W), in the module's dtype."""
        return shared.each_segment(batch, self.module, self._hear)

    def settings(self) -> dict[str, Any]:
        """All that `restore` needs besides the weights. A CLAP that fuses can't be asked without its weights."""
        return shared.settings(self.module, self.processor, self.options) | {"rows": self.rows, "width": self.width}

    def _window(self) -> int:
        """Samples of a window."""
        if self.module.config.model_type == CLAP:
            return self.processor.nb_max_samples
        return self.processor.max_length * self.processor.sampling_rate // 100  # frames of 10 ms

    def _hear(self, spectrograms: "torch.Tensor") -> "torch.Tensor":
        import torch

        if self.module.config.model_type == CLAP:
            # (N, W, frequencies, times). No window is longer than the model's: nothing for it to fuse.
            longer = torch.zeros(len(spectrograms), 1, dtype=torch.bool, device=spectrograms.device)
            grid = self.module(input_features=spectrograms, is_longer=longer).last_hidden_state
            return grid.permute(0, 3, 2, 1).flatten(1, 2)
        config = self.module.config
        patches = self.module(input_values=spectrograms).last_hidden_state[:, TOKENS:]
        frequencies = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        return patches.unflatten(1, (frequencies, -1)).transpose(1, 2).flatten(1, 2)


def build(options: Options, dtype: "torch.dtype", device: "torch.device") -> Encoder:
    """Load a model and its feature extractor, frozen, in evaluation mode. Raises ModelError."""
    from transformers import ASTModel, AutoConfig, AutoFeatureExtractor, ClapAudioModel

    from finetune.common.hub import loading

    with loading(f"encoder {options.name!r}"):
        config = AutoConfig.from_pretrained(options.name, revision=options.revision)
        config = getattr(config, "audio_config", config)
        if config.model_type not in (AST, CLAP):
            raise ModelError(
                f"encoder {options.name!r} is of type {config.model_type!r}, neither AST nor CLAP; `kind: whisper` "
                "reads Whisper, `kind: wave` wav2vec2, HuBERT and WavLM"
            )
        processor = AutoFeatureExtractor.from_pretrained(options.name, revision=options.revision)
        model_class = ClapAudioModel if config.model_type == CLAP else ASTModel
        # Whole CLAPs keep the tower's weights under `audio_model.`.
        module = shared.load(model_class, config, options, dtype, key_mapping={r"^audio_model\.": ""})
    return _finish(module.to(device), processor, options)


def restore(settings: dict[str, Any], dtype: "torch.dtype") -> Encoder:
    """Rebuild from `Encoder.settings()`, with weights still to be loaded."""
    from transformers import ASTModel, ClapAudioModel

    model_class = ClapAudioModel if settings["config"]["model_type"] == CLAP else ASTModel
    module, processor = shared.rebuild(settings, dtype, model_class)
    encoder = Encoder(module, processor, Options(**settings["options"]), settings["rows"], settings["width"])
    encoder.fingerprint = shared.fingerprint(module, settings)
    return encoder


def _finish(module: Any, processor: Any, options: Options) -> Encoder:
    import numpy as np

    module.eval().requires_grad_(False)
    encoder = Encoder(module, processor, options)
    silence = encoder.prepare(np.zeros(RATE, np.float32)).values
    features = shared.probe(options.name, "an AST or a CLAP", module, silence, encoder.encode)
    _, encoder.rows, encoder.width = features.shape
    encoder.fingerprint = shared.fingerprint(module, encoder.settings())
    return encoder
