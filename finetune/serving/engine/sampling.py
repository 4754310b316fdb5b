"""Which token comes next: greedily or by chance, inside a JSON schema or not."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.common.errors import DataError
from finetune.serving.engine.contract import Request

ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `extract` is trained

LEAST_TEMPERATURE = 1e-5


class Vocabulary:
    """A tokenizer as llguidance sees it: tokens as bytes, and what may follow inside a grammar."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        from llguidance.hf import from_tokenizer

        self._tokens = from_tokenizer(tokenizer, eos_token=list(ends))

    def bytes_of(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token]) if token < self._tokens.vocab_size else b""

    def grammar(self, schema: Mapping[str, Any]) -> "Grammar":
        """Raises DataError for a schema that can't be followed."""
        from llguidance import LLMatcher

        wanted = dict(schema) or {"type": "object"}
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(json.dumps(wanted), defaults=ONE_LINE))
        if matcher.is_error():
            raise DataError(f"the JSON schema can't be followed: {matcher.get_error().splitlines()[0]}")
        return Grammar(matcher)


class Grammar:
    """Where in a JSON text an answer stands."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, logits: Tensor) -> Tensor:
        """Logits (V,) on the CPU -> the same, minus infinity for what can't follow. Raises DataError."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: len(logits)] > 0
        if self._matcher.is_error() or not allowed.any():
            reason = self._matcher.get_error().splitlines() or ["no token of this model can follow"]
            raise DataError(f"the JSON schema can't be followed any further: {reason[0]}")
        return logits[: len(allowed)].masked_fill(~allowed, float("-inf"))

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


class Choice:
    """How one answer's tokens are chosen. Nothing of its neighbours in a batch plays a part in it."""

    def __init__(self, request: Request, grammar: Grammar | None = None) -> None:
        self.temperature, self.top_p = request.temperature, request.top_p
        self.grammar = grammar
        # The likeliest token, and nothing to tell of the others: chosen for the whole batch at once.
        self.plain = not request.temperature and request.logprobs is None and grammar is None
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**63)

    def __call__(self, logits: Tensor) -> int:
        """Logits (V,), float32, on the CPU -> a token. Raises DataError where a schema can't be followed."""
        if self.grammar is not None:
            logits = self.grammar.allow(logits)
        token = self._drawn(logits) if self.temperature else int(logits.argmax())
        if self.grammar is not None:
            self.grammar.take(token)
        return token

    def _drawn(self, logits: Tensor) -> int:
        # A tiny temperature would make infinities, of which there are no chances.
        chances = ((logits - logits.max()) / max(self.temperature, LEAST_TEMPERATURE)).softmax(-1)
        if self.top_p < 1:
            ordered, places = chances.sort(descending=True, stable=True)
            # The fewest tokens that have `top_p` together: the one that reaches it is among them.
            chances = torch.zeros_like(chances).scatter(
                0, places, ordered.masked_fill(ordered.cumsum(0) - ordered >= self.top_p, 0.0)
            )
        return int(torch.multinomial(chances, 1, generator=self._generator))


def likeliest(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability (nats) of a token, before temperature and schema, and of the `count` likeliest."""
    told = logits.log_softmax(-1)
    values, places = told.topk(min(count, len(told)))
    return float(told[token]), list(zip(places.tolist(), values.tolist(), strict=True))
