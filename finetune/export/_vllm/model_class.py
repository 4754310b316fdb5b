"""The composite as vLLM's transformers backend takes one: config, model and processor, registered by a plugin.

vLLM needs an older transformers than the rest of this package. This file works with both, and imports nothing of the
package but encoders and projectors, so the package can be installed in vLLM's environment without its dependencies.
vLLM puts its own attention and output head around `language_model`, and calls everything else by name.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import MultiModalData

from finetune.common.registry import load_part
from finetune.model.composition import Composition
from finetune.model.encoders._vision import best_grid

MEDIA = ("image", "audio")


class ServedConfig(PreTrainedConfig):
    """`text_config`: the LLM's. `parts`: encoders and projectors in the form of the merged model's config. `tokens`:
    {medium: its placeholder token}. `max_source_positions`: tokens of half a minute of sound, by the name vLLM reads.
    """

    model_type = "finetune_served"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        parts: dict[str, Any] | None = None,
        tokens: dict[str, str] | None = None,
        max_source_positions: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        super().__init__(**kwargs)
        self.text_config = text_config
        self.parts = parts or Composition().model_dump(mode="json")
        self.tokens = tokens or {}
        self.max_source_positions = max_source_positions


class LinearWeights(nn.Module):
    """The weights of a linear layer that its parent applies without calling it. vLLM would replace an `nn.Linear` by a
    layer of its own, which on a CPU gives its weights away.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias


class ServedModel(PreTrainedModel):
    """The LLM without its head, encoders and projectors."""

    config_class = ServedConfig
    config: ServedConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config: ServedConfig) -> None:
        super().__init__(config)
        self.composition = Composition.model_validate(config.parts)
        width = config.text_config.hidden_size
        self.language_model = AutoModel.from_config(config.text_config)
        self.encoder_parts = encoders_of(config)
        self.encoders = nn.ModuleDict(
            # Built anew: `encoders_of` leaves modules, and buffers that no file has, on the meta device.
            {name: type(e.module)(e.module.config) for name, e in self.encoder_parts.items()}
        )
        self.projectors = nn.ModuleDict(
            {name: saved.part.build(saved.width_in, width) for name, saved in self.composition.projectors.items()}
        )
        for module in [*self.encoders.modules(), *self.projectors.modules()]:
            if isinstance(module, nn.MultiheadAttention):
                module.out_proj = LinearWeights(module.out_proj)  # type: ignore[assignment]
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (S, 3, height, width), of pictures or their tiles -> `pooler_output` (S, L, D)."""
        return self._features("image", pixel_values[:, None])

    def get_audio_features(self, values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Recordings (N, S, ...) as their encoder prepares them -> `pooler_output` (N * S, L, D)."""
        return self._features("audio", values)

    def _features(self, name: str, batch: Tensor) -> BaseModelOutputWithPooling:
        encoder = replace(self.encoder_parts[name], module=self.encoders[name])
        rows = encoder.encode(batch).flatten(0, 1)
        projector = self.projectors[name]
        projected = projector(rows.to(next(projector.parameters()).dtype))
        return BaseModelOutputWithPooling(last_hidden_state=rows, pooler_output=projected)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        return self.language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class ServedProcessor(ProcessorMixin):
    """Text, pictures and recordings -> token ids with a placeholder per projected row, and the encoders' inputs. Has an
    `image_processor` or `feature_extractor` if the model has such an encoder.
    """

    def __init__(self, tokenizer: Any = None, config: ServedConfig | None = None, **kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.config = config or ServedConfig()
        self._placement = Composition.model_validate(self.config.parts).placement
        self.encoders = encoders_of(self.config)
        for medium, name in zip(MEDIA, ("image_processor", "feature_extractor"), strict=True):
            if medium in self.encoders:
                setattr(self, name, self.encoders[medium].processor)
                token = self.config.tokens[medium]
                setattr(self, f"{medium}_token", token)
                setattr(self, f"{medium}_token_id", tokenizer.convert_tokens_to_ids(token))

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "ServedProcessor":
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
        config = ServedConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        return cls(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub), config)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: Any = None,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """`images`: RGB pictures; `audio`: samples at 16 kHz. One text, with a placeholder for each of them."""
        inputs: dict[str, Any] = {}
        replacements: dict[str, list[str]] = {}
        for medium, media in (("image", images), ("audio", audio)):
            if media is not None and medium in self.encoders:
                prepared = [self.encoders[medium].prepare(decoded) for decoded in _as_list(media)]
                values = [one.values for one in prepared]
                inputs[self._key(medium)] = torch.cat(values) if medium == "image" else values
                replacements[medium] = [
                    self.config.tokens[medium] * self._count(medium, one.layout.rows, len(one.layout.marks))
                    for one in prepared
                ]
        texts = [text] if isinstance(text, str) else list(text or [""])
        texts, offsets = self.get_text_with_replacements(
            texts, replacements.get("image", []), [], replacements.get("audio", [])
        )
        ids = self.tokenizer(texts, add_special_tokens=kwargs.get("add_special_tokens", False))
        inputs |= {name: torch.tensor(ids[name]) for name in ("input_ids", "attention_mask")}
        if return_text_replacement_offsets:
            inputs["text_replacement_offsets"] = offsets
        return BatchFeature(inputs)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Tokens, and rows of `pixel_values`, of pictures of these sizes (height, width)."""
        encoder = self.encoders["image"]
        segments = [_segments(encoder, *size) for size in image_sizes or ()]
        rows = encoder.shape.rows
        tokens = [self._count("image", rows, count) for count in segments]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=segments)

    def _count(self, medium: str, rows: int, segments: int) -> int:
        return self._placement.projectors[medium].length(rows) * segments

    def _key(self, medium: str) -> str:
        """The input's name, by which vLLM recognizes its medium."""
        if medium == "image":
            return "pixel_values"
        names = self.feature_extractor.model_input_names
        return "input_features" if "input_features" in names else "input_values"


def encoders_of(config: ServedConfig) -> dict[str, Any]:
    """{name: Encoder} on the meta device: enough to prepare media and to know shapes."""
    with torch.device("meta"):
        return {
            name: load_part("encoders", saved.kind).restore(saved.settings, torch.get_default_dtype())
            for name, saved in Composition.model_validate(config.parts).encoders.items()
        }


def _segments(encoder: Any, height: int, width: int) -> int:
    """Tiles of a picture, plus the whole picture if it is cut."""
    shape, limit = encoder.shape, encoder.options.tiles
    columns, rows = best_grid(width / height, width * height / (shape.width * shape.height), limit)
    return 1 if columns * rows == 1 else columns * rows + 1


def _as_list(media: Any) -> list[Any]:
    return list(media) if isinstance(media, list | tuple) else [media]


def register() -> None:
    """The entry point that vLLM calls in each of its processes, any number of times."""
    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoModel.register(ServedConfig, ServedModel, exist_ok=True)
    AutoProcessor.register(ServedConfig, ServedProcessor, exist_ok=True)
