"""The next token: greedy or sampled, within a JSON schema if there is one."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from finetune.common.errors import DataError
from finetune.serving.engine.contract import JsonSchema, Request

ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `extract` is trained
LOWEST_TEMPERATURE = 1e-5


class Vocabulary:
    """A tokenizer for llguidance: tokens as bytes, and what JSON schemas allow."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        from llguidance.hf import from_tokenizer

        self._tokens = from_tokenizer(tokenizer, eos_token=list(ends))

    def bytes_of(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token]) if token < self._tokens.vocab_size else b""

    def matcher(self, schema: JsonSchema) -> Any:
        """llguidance's matcher of answers to a JSON schema. Raises DataError for a schema that it doesn't support."""
        from llguidance import LLMatcher

        content = json.dumps(dict(schema) or {"type": "object"})
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(content, defaults=ONE_LINE))
        if matcher.is_error():
            raise DataError(f"the JSON schema can't be followed: {matcher.get_error().splitlines()[0]}")
        return matcher


class Sampler:
    """Chooses the tokens of one answer, independently of the rest of its batch. `matcher`: of its JSON schema."""

    def __init__(self, request: Request, matcher: Any = None) -> None:
        self.temperature, self.top_p = request.temperature, request.top_p
        # Needs nothing but the argmax, which is computed for the whole batch at once.
        self.plain = not request.temperature and request.logprobs is None and matcher is None
        self._matcher = matcher
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**63)

    def __call__(self, logits: Tensor) -> int:
        """Logits (V,), float32, on the CPU -> a token. Raises DataError if the schema can't be followed."""
        if self._matcher is not None:
            logits = self._within_schema(logits)
        token = self._sample(logits) if self.temperature else int(logits.argmax())
        if self._matcher is not None:
            self._matcher.consume_token(token)
        return token

    def _within_schema(self, logits: Tensor) -> Tensor:
        """The same logits, minus infinity for tokens that can't follow."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: len(logits)] > 0
        if self._matcher.is_error() or not allowed.any():
            reason = self._matcher.get_error().splitlines() or ["no token of this model can follow"]
            raise DataError(f"the JSON schema can't be followed any further: {reason[0]}")
        return logits[: len(allowed)].masked_fill(~allowed, float("-inf"))

    def _sample(self, logits: Tensor) -> int:
        # Dividing by a tiny temperature would overflow to infinities.
        logits = (logits - logits.max()) / max(self.temperature, LOWEST_TEMPERATURE)
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(torch.empty(0, dtype=torch.long), logits[None])[0]
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability (nats) of a token, before temperature and schema, and those of the `count` likeliest."""
    nats = logits.log_softmax(-1)
    values, tokens = nats.topk(min(count, len(nats)))
    return float(nats[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
