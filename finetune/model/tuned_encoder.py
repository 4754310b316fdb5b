"""Encoders that train: their last layers, or LoRA on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finetune.common.errors import ModelError
from finetune.model.module_names import is_lora


@dataclass
class TunedEncoder:
    """An encoder that trains: names of the parameters that do, and PEFT's wrapper where these are LoRA."""

    names: list[str]
    lora: PeftModel | None = None


def tune_encoder(
    encoder: Any,
    decoded: Any,
    *,
    last_layers: int | None = None,
    rank: int | None = None,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "all-linear",
) -> TunedEncoder:
    """Make an encoder tunable, in place: the last n of the layers that its features come through, or LoRA of a rank.

    `decoded`, any medium that it takes, shows what its features come through: poolers, heads and layers behind the one
    that is read have no part in it, and would never learn. Raises ModelError.
    """
    module = encoder.module
    if last_layers is not None:
        module.float()  # all of it: norms of some backbones take no other dtype in than their weights have
        reached = _reached(encoder, decoded)
        layers = [kept for layer in _layers(module, reached) if (kept := [n for n in layer if n in reached])]
        if last_layers > len(layers):
            raise ModelError(
                f"tune_encoders: last_layers is {last_layers}, but features of this {type(module).__name__} come "
                f"through {len(layers)}"
            )
        return TunedEncoder([name for layer in layers[-last_layers:] for name in layer])
    config = LoraConfig(
        r=rank,  # type: ignore[arg-type]
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        lora: Any = get_peft_model(module, config)  # type: ignore[arg-type]
    except (ValueError, ImportError, TypeError) as error:
        if targets == "all-linear" and not any(isinstance(m, nn.Linear) for m in module.modules()):
            message = (
                f"tune_encoders: {type(module).__name__} has no linear layers for LoRA: write last_layers, not rank"
            )
            raise ModelError(message) from None
        raise ModelError(f"tune_encoders: PEFT refuses it: {' '.join(str(error).split())[:300]}") from error
    reached = _reached(encoder, decoded)
    return TunedEncoder([name for name, _ in module.named_parameters() if is_lora(name) and name in reached], lora)


def _reached(encoder: Any, decoded: Any) -> set[str]:
    """Names of the parameters that an encoder's features depend on."""
    own = {name: p for name, p in encoder.module.named_parameters() if p.is_floating_point()}
    encoder.module.requires_grad_(True)
    with torch.enable_grad():
        features = encoder.encode(encoder.prepare(decoded).values[None])
        gradients = torch.autograd.grad(features.float().sum(), list(own.values()), allow_unused=True)
    encoder.module.requires_grad_(False)
    return {name for name, gradient in zip(own, gradients, strict=True) if gradient is not None}


def _layers(module: Any, reached: set[str]) -> list[list[str]]:
    """Parameter names of each layer: of the last list as long as the config says, or of the longest."""
    names = {id(p): name for name, p in module.named_parameters()}
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    lists = [m for m in lists if any(names[id(p)] in reached for p in m.parameters())]
    told = [m for m in lists if len(m) == getattr(module.config, "num_hidden_layers", None)]
    chosen = told[-1] if told else max(lists, key=len, default=nn.ModuleList())
    return [[names[id(p)] for p in layer.parameters()] for layer in chosen]
