"""One answer in the making: what was asked, the tokens so far, and what has been told of them."""

import time
from typing import Any

from torch import Tensor

from finetune.common.errors import DataError
from finetune.serving.engine.contract import Piece, Request, Token
from finetune.serving.engine.reading import Prompt
from finetune.serving.engine.sampling import Choice, Vocabulary, likeliest
from finetune.serving.engine.stream import Stream
from finetune.serving.engine.text import Text


class Row:
    """`limit`: most new tokens; `ends`: tokens that end an answer; `weights`: what each medium weighs."""

    def __init__(
        self,
        request: Request,
        stream: Stream,
        prompt: Prompt,
        *,
        limit: int,
        ends: frozenset[int],
        tokenizer: Any,
        vocabulary: Vocabulary | None,
        weights: dict[str, float],
    ) -> None:
        self.request, self.stream, self.prompt = request, stream, prompt
        self.limit, self.ends, self.weights = limit, ends, weights
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._end: Piece | None = None  # told when the row has left its batch
        self.block_names: list[bytes] = []  # of its prompt, in the prefix cache
        grammar = vocabulary.grammar(request.schema) if vocabulary and request.schema is not None else None
        self.choice = Choice(request, grammar)
        self._text = Text(tokenizer, request.stop)
        self._vocabulary = vocabulary
        self._untold: list[tuple[Token, int]] = []  # tokens not told yet, and where their text begins
        self.begun = time.monotonic()
        stream.prompt_tokens = len(prompt.input_ids)

    @property
    def length(self) -> int:
        """Tokens that the LLM has read or is about to."""
        return len(self.prompt.input_ids) + len(self.tokens)

    @property
    def done(self) -> bool:
        """Whether it has ended, or nobody waits for it any more."""
        return self.finish_reason is not None or self.stream.cancelled

    def look_at_clock(self) -> None:
        """End it if it has taken too long."""
        if not self.done and time.monotonic() > self.stream.deadline:
            self.fail(self.stream.timed_out)

    def fail(self, error: BaseException) -> None:
        """It ends here: whoever reads is told why."""
        self.finish_reason = "error"
        self.stream.fail(error)

    def choose(self, logits: Tensor) -> None:
        """Logits (V,) of what comes next -> one more token, or the end where a schema can't be followed."""
        logits = logits.float().cpu()
        try:
            token = self.choice(logits)
        except DataError as error:
            self.fail(error)
            return
        told = None
        if self.request.logprobs is not None:
            assert self._vocabulary is not None
            own, others = likeliest(logits, token, self.request.logprobs)
            alternatives = tuple((*self._spelt(other), nats) for other, nats in others)
            told = Token(*self._spelt(token), own, alternatives)
        self.take(token, told)

    def take(self, token: int, told: Token | None = None) -> None:
        """One more token, and all that has become certain with it to the stream."""
        if told is not None:
            self._untold.append((told, self._text.length))
        self.tokens.append(token)
        self._text.add(token)
        if self._text.stopped or token in self.ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        last = self.finish_reason is not None
        text = self._text.release(last)
        if last and self._text.stopped:  # by a stop string of which a half character was part
            self.finish_reason = "stop"
        self.stream.completion_tokens = len(self.tokens)
        if last:
            end = self._text.end if self._text.stopped else float("inf")
            self._end = Piece(text, tuple(t for t, start in self._untold if start < end), self.finish_reason)
        elif text:
            ready = tuple(t for t, _ in self._untold) if self._text.whole else ()
            self._untold = [] if ready else self._untold
            self.stream.put(Piece(text, ready))

    def tell_end(self) -> None:
        """The last piece to the stream, once."""
        if self._end is not None:
            self.stream.put(self._end)
            self._end = None

    def _spelt(self, token: int) -> tuple[str, bytes]:
        assert self._vocabulary is not None
        raw = self._vocabulary.bytes_of(token)
        return raw.decode("utf-8", errors="replace"), raw
