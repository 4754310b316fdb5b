"""A family of published models, small: what its folder holds, and what is asked of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from families.tokenizers_of import SIZE, sentencepiece_model, tokenizer_of

TEXT = {  # wide enough for nf4: 64 in, 32 out; heads as wide as vLLM needs them on a CPU
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,  # llama.cpp numbers a projector's layers as it does these
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MEANS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


@dataclass(frozen=True)
class Family:
    """`config`: of the model, with tokens written out where the config has their ids. `special`: the tokens beside the
    learned ones. `named`: the tokenizer's attributes. `recipe_template`: the chat template that a recipe gives where
    none is published. `needs`: packages without which the family's processor doesn't load. `seed`: of
    weights whose answers differ from medium to medium. The other mappings are the files of that name as they are
    published.
    """

    model_type: str
    architecture: str
    media: tuple[str, ...]
    config: Mapping[str, Any]
    tokenizer: str
    special: tuple[str, ...]
    named: Mapping[str, str]
    chat_template: str
    preprocessor_config: Mapping[str, Any]
    processor_config: Mapping[str, Any]
    video_preprocessor_config: Mapping[str, Any] = field(default_factory=dict)
    begins_with: str | None = None
    recipe_template: str | None = None
    needs: tuple[str, ...] = ()
    seed: int = 0

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.needs if find_spec(name) is None)

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.architecture)


def write_family(family: Family, folder: Path) -> Path:
    """The folder as the Hub has it: config, random weights, tokenizer, processors, chat template."""
    tokenizer = tokenizer_of(family.tokenizer, family.special, family.named, family.begins_with)
    torch.manual_seed(family.seed)
    config = transformers.AutoConfig.for_model(family.model_type, **_with_ids(family.config, tokenizer))
    model = _felt(family.model_class(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    _as_published(folder / "model.safetensors", config)
    tokenizer.save_pretrained(folder)
    if family.tokenizer == "metaspace":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokenizer))
    if family.chat_template:
        (folder / "chat_template.jinja").write_text(family.chat_template)
    for name in ("preprocessor_config", "processor_config", "video_preprocessor_config"):
        if content := getattr(family, name):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    return folder


def _with_ids(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = _with_ids(value, tokenizer)
        elif isinstance(value, str) and key.endswith(("_token_id", "_token_index")):
            value = tokenizer.convert_tokens_to_ids(value)
            assert value is not None, key
        values[key] = value
    return values


def _as_published(weights: Path, config: Any) -> None:
    """Rename a CLIP or SigLIP tower's weights: transformers keeps their published names only where it read them."""
    tower = getattr(config, "vision_config", None)
    if getattr(tower, "model_type", None) in ("clip_vision_model", "siglip_vision_model"):
        old, new = "vision_tower.", "vision_tower.vision_model."
        tensors = {name.replace(old, new, 1): tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})


def _felt(model: nn.Module) -> Any:
    """Fresh weights are too small for a leak to show, some are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
