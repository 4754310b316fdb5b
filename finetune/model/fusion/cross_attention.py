"""Gated cross-attention before some of the LLM's layers: the text gives queries, the media keys and values, and the
result is added times tanh(gate) times `strength` (Flamingo, Alayrac et al. 2022, https://arxiv.org/abs/2204.14198).

Each segment has one placeholder token in the text, embedded as zeros. A token attends to the media of its own sample
that precede it. At strength 0, and before training, the LLM computes exactly what it does without media.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    from torch import nn

TRAINED = True
BY_SAMPLE = True
Strength = Annotated[float, Field(ge=0)]


class Options(PartOptions):
    every: int = Field(2, ge=1, description="Put a block before every n-th layer of the LLM.")
    heads: int = Field(8, ge=1, description="Attention heads of a block.")
    head_width: int = Field(64, ge=1, description="Width of a head.")
    gate: float = Field(
        0.0, description="Value of all gates before training; a block adds tanh(gate) times its attention."
    )
    strength: Strength | dict[str, Strength] = Field(
        1.0,
        description="Factor of what media add, or one per medium; 0: the text-only LLM. Can be changed after training.",
    )


def placeholders(rows: int, options: Options) -> int:
    return 1


def build(language_model_config: Any, names: Sequence[str], options: Options) -> "nn.Module":
    from torch import nn

    from finetune.model.fusion._cross_attention import Attention, CrossAttention

    strengths = options.strength if isinstance(options.strength, dict) else dict.fromkeys(names, options.strength)
    if unknown := strengths.keys() - set(names):
        raise ModelError(
            f"fusion.strength: {', '.join(sorted(unknown))}: no such medium; there are: {', '.join(names)}"
        )
    width, count = language_model_config.hidden_size, max(1, language_model_config.num_hidden_layers // options.every)
    blocks = nn.ModuleList(
        nn.ModuleDict({name: Attention(width, options.heads, options.head_width, options.gate) for name in names})
        for _ in range(count)
    )
    return CrossAttention(blocks, options.every, dict.fromkeys(names, 1.0) | strengths)
