"""Encoders that train: their last layers, or LoRA on them."""

from dataclasses import dataclass
from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune.common.errors import ModelError
from finetune.model.encoders import together
from finetune.model.module_names import is_lora
from finetune.recipe.schema import EncoderTuning


@dataclass
class TunedEncoder:
    """Names of the parameters that train, and PEFT's wrapper where these are LoRA."""

    names: list[str]
    lora: PeftModel | None = None


def tune_encoder(encoder: Any, decoded: Any, tuning: EncoderTuning) -> TunedEncoder:
    """Make an encoder tunable, in place: its last n layers, or LoRA.

    `decoded`, any medium that it takes, shows by a gradient which parameters its features depend on: poolers, heads and
    layers behind the one that is read would never learn. Raises ModelError.
    """
    if tuning.last_layers is not None:
        return _last_layers(encoder, decoded, tuning.last_layers)
    module = encoder.module
    config = LoraConfig(
        r=tuning.rank,  # type: ignore[arg-type]
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]
        target_modules=tuning.targets,
    )
    try:
        lora: Any = get_peft_model(module, config)
    except (ValueError, ImportError, TypeError) as error:
        if tuning.targets == "all-linear" and not any(isinstance(m, nn.Linear) for m in module.modules()):
            message = (
                f"tune_encoders: {type(module).__name__} has no linear layers for LoRA: write last_layers, not rank"
            )
            raise ModelError(message) from None
        raise ModelError(f"tune_encoders: PEFT refuses it: {' '.join(str(error).split())[:300]}") from error
    used = _used(encoder, decoded)
    return TunedEncoder([name for name, _ in module.named_parameters() if is_lora(name) and name in used], lora)


def _last_layers(encoder: Any, decoded: Any, count: int) -> TunedEncoder:
    module = encoder.module
    module.float()  # all of it: norms of some backbones take no other dtype than their weights have
    used = _used(encoder, decoded)
    layers = [names for layer in _layers(module, used) if (names := [name for name in layer if name in used])]
    if count > len(layers):
        raise ModelError(
            f"tune_encoders: last_layers is {count}, but features of this {type(module).__name__} come through "
            f"{len(layers)}"
        )
    return TunedEncoder([name for layer in layers[-count:] for name in layer])


def _used(encoder: Any, decoded: Any) -> set[str]:
    """Names of the parameters that an encoder's features depend on."""
    parameters = {name: p for name, p in encoder.module.named_parameters() if p.is_floating_point()}
    encoder.module.requires_grad_(True)
    with torch.enable_grad():
        features = encoder.encode(together([encoder.prepare(decoded).values]))
        gradients = torch.autograd.grad(features.float().sum(), list(parameters.values()), allow_unused=True)
    encoder.module.requires_grad_(False)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _layers(module: Any, used: set[str]) -> list[list[str]]:
    """Parameter names of each layer: of the last list as long as the config says, or of the longest."""
    names = {id(p): name for name, p in module.named_parameters()}
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    lists = [m for m in lists if any(names[id(p)] in used for p in m.parameters())]
    as_configured = [m for m in lists if len(m) == getattr(module.config, "num_hidden_layers", None)]
    layers = as_configured[-1] if as_configured else max(lists, key=len, default=nn.ModuleList())
    return [[names[id(p)] for p in layer.parameters()] for layer in layers]
