"""Answers of a base whose `generate` takes no embeddings.

Shapes:  B prompts of T tokens, padded on the left   D width of the LLM   T' new tokens
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling


def generate_by_own_forward(
    language_model: Any, placeholders: Mapping[str, int], input_ids: Tensor, embeddings: Tensor, **options: Any
) -> Tensor:
    """From token ids (B, T), with what stands for media among the embeddings (B, T, D) -> (B, T'). For bases in which
    all of a prompt sees its last token. `placeholders`: {medium: token id}; `options`: of `generate`.
    """
    rows = {kind: embeddings[input_ids == number] for kind, number in placeholders.items()}
    encoded = {kind: BaseModelOutputWithPooling(pooler_output=one) for kind, one in rows.items() if len(one)}
    tokens: Tensor = language_model.generate(input_ids=input_ids, mm_encoder_outputs=encoded, **options)
    return tokens[:, input_ids.shape[1] :]


def generate_from_memory(
    language_model: Any, causal_lm: Any, input_ids: Tensor, embeddings: Tensor, mask: Tensor, **options: Any
) -> Tensor:
    """Read all of the prompts (B, T, D) but their last tokens, which are text, and let `generate` go on -> (B, T').
    `causal_lm`: `language_model` without an adapter's wrapper; `options`: of `generate`.
    """
    cache = DynamicCache(config=causal_lm.config.get_text_config())
    known = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), **options}
    beside = {name: known[name][..., :-1] for name in ("position_ids", "token_type_ids") if name in known}
    reading: dict[str, Any] = {"attention_mask": mask[:, :-1], "past_key_values": cache, "use_cache": True}
    causal_lm.base_model(inputs_embeds=embeddings[:, :-1], **reading, **beside)
    options.pop("token_type_ids", None)
    tokens: Tensor = language_model.generate(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **options)
    return tokens[:, input_ids.shape[1] :]
