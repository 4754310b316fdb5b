"""Prompts as a batch, and what the model makes of them: text, outputs of a head, the likelihood of given answers.

Prompts that begin alike may stand behind a prefix, which the LLM reads once for all of them.

Shapes:  B prompts   T tokens of a prompt   P tokens of a prefix   A given answers
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from finetune.common.errors import ModelError
from finetune.data.sample import by_kind
from finetune.model.composite import MultimodalModel, Tensors
from finetune.model.features import MediaView
from finetune.model.padding import left_padded, left_padded_positions, position_ids
from finetune.model.tokenize import Tokens


@dataclass(frozen=True)
class PromptBatch:
    """`input_ids` and `attention_mask` (B, T), padded on the left; `features` {medium: each (S, L, W)}. `prefix`: what
    the prompts begin with, if that isn't in them. `rope_positions` (3, B, T): where positions have three dimensions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    features: Tensors
    prefix: "PromptPrefix | None" = None
    rope_positions: Tensor | None = None

    @classmethod
    def of(cls, prompts: Sequence[Tokens], view: MediaView, pad: int, device: torch.device) -> "PromptBatch":
        """Tokenized prompts, with the features of their media."""
        ids, mask = left_padded([prompt.input_ids for prompt in prompts], pad, device)
        media = by_kind(medium for prompt in prompts for medium in prompt.media)
        features = {kind: [*map(view.features, own)] for kind, own in media.items()}
        return cls(ids, mask, features, rope_positions=left_padded_positions([p.positions for p in prompts], mask))

    @property
    def whole_mask(self) -> Tensor:
        """The mask with that of the prefixes before it, (B, P + T)."""
        if self.prefix is None:
            return self.attention_mask
        return torch.cat([self.prefix.prompts.attention_mask[self.prefix.owner], self.attention_mask], 1)

    @property
    def whole_positions(self) -> Tensor:
        """(B, P + T), or (4, B, P + T) where they have three dimensions."""
        return position_ids(self.whole_mask, self.whole_rope)

    @property
    def position_ids(self) -> Tensor:
        """(B, T) or (4, B, T); they go on from the prefixes."""
        return self.whole_positions[..., -self.input_ids.shape[1] :]

    @property
    def whole_rope(self) -> Tensor | None:
        """`rope_positions` with those of the prefixes before them, (3, B, P + T)."""
        if self.prefix is None or self.rope_positions is None:
            return self.rope_positions
        before = self.prefix.prompts.rope_positions
        assert before is not None
        return torch.cat([before[:, self.prefix.owner], self.rope_positions], 2)


@dataclass(frozen=True)
class PromptPrefix:
    """What prompts begin with, each once, as `prompts` without a prefix. `owner` (B,): which of them a prompt begins
    with.
    """

    prompts: PromptBatch
    owner: Tensor


def reads_on(model: MultimodalModel, tokens: int) -> bool:
    """Whether a prompt may be read in two parts with padding between them, together of so many tokens: positions are
    given, and no sliding window counts the padding.
    """
    window = getattr(model.causal_lm.config.get_text_config(), "sliding_window", None)
    return (
        model.shares_memory
        and model.both_ways is None
        and model.llm_takes("position_ids")
        and (window is None or tokens <= window)
    )


@torch.no_grad()
def logits(model: MultimodalModel, batch: PromptBatch) -> Tensor:
    """Of the token after each of the prompts' tokens (B, T, vocabulary); the prompts have no prefix."""
    positions = {} if batch.rope_positions is None else {"position_ids": batch.position_ids}
    found: Tensor = model(batch.input_ids, batch.features, attention_mask=batch.attention_mask, **positions).logits
    return found


def generate(model: MultimodalModel, batch: PromptBatch, **options: Any) -> Tensor:
    """New tokens only (B, T'). `options`: of transformers' `generate`."""
    memory: dict[str, Any] = {} if batch.prefix is None else {"past_key_values": _read(model, batch.prefix)}
    if batch.rope_positions is not None:
        memory["position_ids"] = batch.whole_positions
    return model.generate(batch.input_ids, batch.whole_mask, batch.features, **memory, **options)


@torch.no_grad()
def head_outputs(model: MultimodalModel, name: str, batch: PromptBatch) -> Tensor:
    """Outputs of head `name` at the last states of the prompts (B, outputs)."""
    memory: dict[str, Any] = {"use_cache": False}
    if batch.prefix is not None:
        memory = {"past_key_values": _read(model, batch.prefix), "use_cache": True}
    count, tokens = batch.input_ids.shape
    last = torch.arange(1, count + 1, device=batch.input_ids.device) * tokens - 1
    model.backbone(
        batch.input_ids,
        batch.features,
        attention_mask=batch.whole_mask,
        head_rows={other: last if other == name else last[:0] for other in model.heads},
        **memory,
        **_at(model, batch.position_ids),
    )
    return model.head_scores[name]


@torch.no_grad()
def answer_log_probabilities(model: MultimodalModel, batch: PromptBatch, answers: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (B, A), in nats, of answers (token ids) to the prompts.

    A prompt is read once, and its keys and values are shared by all answers; LLMs with another memory than keys and
    values (Mamba, RWKV, hybrids) take one prompt, and read it once an answer. Raises ModelError where these get more.
    """
    if not model.shares_memory:
        if len(batch.input_ids) > 1:
            raise ModelError("this LLM's memory isn't keys and values alone: pass one prompt at a time")
        return _each_in_full(model, batch, answers)
    device, count, prompts = batch.input_ids.device, len(answers), len(batch.input_ids)
    longest = max(len(answer) for answer in answers)
    longest += longest == batch.input_ids.shape[1]  # fusions tell new tokens from the prompt by their number
    ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=device)
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=device)
    cache = _empty_cache(model) if batch.prefix is None else _read(model, batch.prefix)
    first = model.causal_lm(
        inputs_embeds=model.embed(batch.input_ids, batch.features),
        attention_mask=batch.whole_mask,
        past_key_values=cache,
        use_cache=True,
        **_beside(model, batch),
        **({"logits_to_keep": 1} if model.llm_takes("logits_to_keep") else {}),
    ).logits[:, -1:]
    cache.batch_repeat_interleave(count)
    after = batch.position_ids[..., -1:].repeat_interleave(count, -2) + 1 + torch.arange(longest, device=device)
    logits = model.causal_lm(
        inputs_embeds=model.get_input_embeddings()(ids).repeat(prompts, 1, 1),
        attention_mask=torch.cat([batch.whole_mask.repeat_interleave(count, 0), real.repeat(prompts, 1)], 1),
        past_key_values=cache,
        use_cache=True,
        **_at(model, after),
    ).logits
    model.forget_media()
    logits = torch.cat([first.repeat_interleave(count, 0), logits[:, :-1]], 1).float()
    log_probabilities = logits.log_softmax(-1).gather(-1, ids.repeat(prompts, 1)[..., None])[..., 0]
    return (log_probabilities * real.repeat(prompts, 1)).sum(-1).view(prompts, count)


def _each_in_full(model: MultimodalModel, batch: PromptBatch, answers: Sequence[Sequence[int]]) -> Tensor:
    """Of one prompt, read once for each answer -> (1, A)."""
    sums, prompt = [], batch.input_ids[0]
    for answer in answers:
        tokens = torch.tensor(answer, device=prompt.device)
        whole = torch.cat([prompt, tokens])[None]
        options: dict[str, Any] = {"attention_mask": torch.ones_like(whole), "use_cache": False}
        if batch.rope_positions is not None:
            new = batch.position_ids[..., -1:] + 1 + torch.arange(len(tokens), device=prompt.device)
            options["position_ids"] = torch.cat([batch.position_ids, new], -1)
        logits = model(whole, batch.features, **options).logits
        log_probabilities = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        sums.append(log_probabilities.gather(-1, tokens[:, None]).sum())
    return torch.stack(sums)[None]


def _read(model: MultimodalModel, prefix: PromptPrefix) -> DynamicCache:
    """Keys and values of the prefix (B, P) of each prompt."""
    cache, prompts = _empty_cache(model), prefix.prompts
    model.causal_lm.base_model(
        inputs_embeds=model.embed(prompts.input_ids, prompts.features),
        attention_mask=prompts.attention_mask,
        past_key_values=cache,
        use_cache=True,
        **_beside(model, prompts),
    )
    cache.batch_select_indices(prefix.owner)
    return cache


def _empty_cache(model: MultimodalModel) -> DynamicCache:
    return DynamicCache(config=model.causal_lm.config.get_text_config())


def _beside(model: MultimodalModel, batch: PromptBatch) -> dict[str, Any]:
    return {**_at(model, batch.position_ids), **model.token_types(batch.input_ids)}


def _at(model: MultimodalModel, position_ids: Tensor) -> dict[str, Any]:
    """Position ids for LLMs that take them: others (ALiBi) tell positions from the mask."""
    return {"position_ids": position_ids} if model.llm_takes("position_ids") else {}
