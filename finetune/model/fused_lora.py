"""LoRA beside a frozen linear layer as one autograd function.

PEFT's layer adds LoRA to a copy of the frozen layer's output, and each operation on the way makes a tensor. Here LoRA
is added in place, forward and backward. The weights, their names and the results are PEFT's.
"""

from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn


def fuse(config: LoraConfig, language_model: nn.Module) -> None:
    """Have PEFT build layers that are computed at once, for linear layers in 4, 16 or 32 bits."""
    config._register_custom_module({Linear4bit: FusedLinear4bit})
    if not any(isinstance(module, Linear4bit | Linear8bitLt) for module in language_model.modules()):
        config._register_custom_module({nn.Linear: FusedLinear})


class _Fused:
    """Before one of PEFT's layers: computes at once what plain LoRA in training is, and leaves the rest to it."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or name not in self.lora_A or not self._is_plain(name, x):
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if self.training and isinstance(dropout, nn.Dropout) else None
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        fused: Tensor = _LinearWithLora.apply(x, dropped, first, second, self.scaling[name], self.base_layer)
        return fused

    def _is_plain(self: Any, name: str, x: Tensor) -> bool:
        weight, device = self.lora_A[name].weight, x.device.type
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return (
            torch.is_grad_enabled()
            and x.dtype == computed
            and not (self.disable_adapters or self.merged or self.fan_in_fan_out)
            and not (self.lora_variant or self.lora_bias[name] or self.base_layer.weight.requires_grad)
            and not torch.compiler.is_compiling()
        )


class FusedLinear(_Fused, lora.Linear):
    """Of a frozen `nn.Linear`."""


class FusedLinear4bit(_Fused, lora.Linear4bit):
    """Of a frozen layer of bitsandbytes in 4 bits."""


class _LinearWithLora(torch.autograd.Function):
    """x (..., I), LoRA's A (R, I) and B (O, R) -> base(x) + scaling · (x Aᵀ) Bᵀ, (..., O), in the dtype of x.
    `dropped`: what LoRA gets in place of x.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, dropped: Tensor | None, first: Tensor, second: Tensor, scaling: float, base: nn.Module
    ) -> Tensor:
        result: Tensor = base(x)
        rows = (x if dropped is None else dropped).flatten(0, -2)
        inner = rows @ first.to(x.dtype).t()
        result.view(-1, result.shape[-1]).addmm_(inner, second.to(x.dtype).t(), alpha=scaling)
        _, _, learns_first, learns_second, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if learns_first else None, inner if learns_second else None, first, second)
        ctx.scaling, ctx.base, ctx.shape, ctx.is_dropped = scaling, base, x.shape, dropped is not None
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inner, first, second = ctx.saved_tensors
        outer = gradient.flatten(0, -2)
        to_inner = (outer @ second.to(outer.dtype)).mul_(ctx.scaling)
        to_first = (to_inner.t() @ rows).to(first.dtype) if ctx.needs_input_grad[2] else None
        to_second = (outer.t() @ inner).mul_(ctx.scaling).to(second.dtype) if ctx.needs_input_grad[3] else None
        to_x = outer @ frozen_weight(ctx.base, outer.dtype) if ctx.needs_input_grad[0] else None
        to_dropped = None
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            to_dropped = (to_inner @ first.to(outer.dtype)).view(ctx.shape)
        elif to_x is not None:
            to_x.addmm_(to_inner, first.to(outer.dtype))
        return None if to_x is None else to_x.view(ctx.shape), to_dropped, to_first, to_second, None, None


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) of a linear layer, dequantized where it has 4 bits."""
    stored = base.weight
    weight: Tensor = dequantize_4bit(stored.data, stored.quant_state) if isinstance(base, Linear4bit) else stored
    return weight.to(dtype)
