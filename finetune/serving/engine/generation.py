"""One answer while it is generated: its request, its tokens so far, and the text that has been sent."""

import time
from collections.abc import Iterable

from torch import Tensor

from finetune.common.errors import DataError
from finetune.serving.engine.answer_stream import AnswerStream
from finetune.serving.engine.contract import AnswerPiece, Request, Token
from finetune.serving.engine.prompt import RequestPrompt
from finetune.serving.engine.sampling import Sampler, Vocabulary, log_probabilities
from finetune.serving.engine.text import IncrementalDecoder


class Generation:
    """It ends after `limit` new tokens, with one of the tokens `ends`, or before a stop string.

    strengths: the factor of each kind of media
    vocabulary: needed for a schema or log-probabilities
    """

    def __init__(
        self,
        request: Request,
        stream: AnswerStream,
        prompt: RequestPrompt,
        decoder: IncrementalDecoder,
        *,
        limit: int,
        ends: frozenset[int],
        strengths: dict[str, float],
        vocabulary: Vocabulary | None,
    ) -> None:
        self.request, self.stream, self.prompt = request, stream, prompt
        self.limit, self.ends, self.strengths = limit, ends, strengths
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cache_keys: list[bytes] = []  # of its prompt's blocks, in the prefix cache
        matcher = vocabulary.matcher(request.schema) if vocabulary and request.schema is not None else None
        self.sampler = Sampler(request, matcher)
        self.begun = time.monotonic()
        self._last: AnswerPiece | None = None  # sent when the answer has left its batch
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._unsent: list[tuple[Token, int]] = []  # tokens to report, and where their text begins
        stream.prompt_tokens = len(prompt.input_ids)

    @property
    def input_ids(self) -> list[int]:
        """The prompt and all tokens so far."""
        return self.prompt.input_ids + self.tokens

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids) + len(self.tokens)

    @property
    def done(self) -> bool:
        """Whether it has ended or was cancelled."""
        return self.finish_reason is not None or self.stream.cancelled

    def check_deadline(self) -> None:
        """End the answer if it has taken too long."""
        if not self.done and time.monotonic() > self.stream.deadline:
            self.fail(self.stream.timed_out)

    def fail(self, error: BaseException) -> None:
        self.finish_reason = "error"
        self.stream.put(error)

    def choose(self, logits: Tensor) -> None:
        """Add the token that logits (V,) give; the answer ends if its schema can't be followed."""
        logits = logits.float().cpu()
        try:
            token = self.sampler(logits)
        except DataError as error:
            self.fail(error)
            return
        details = None
        if self.request.logprobs is not None:
            logprob, others = log_probabilities(logits, token, self.request.logprobs)
            alternatives = tuple((*self._spelling(other), nats) for other, nats in others)
            details = Token(*self._spelling(token), logprob, alternatives)
        self.take(token, details)

    def take(self, token: int, details: Token | None = None) -> None:
        """Add a token, and send the text that has become final with it."""
        decoder = self._decoder
        if details is not None:
            self._unsent.append((details, decoder.length))
        self.tokens.append(token)
        decoder.add(token)
        if decoder.stopped or token in self.ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        last = self.finish_reason is not None
        text = decoder.release(last)
        if last and decoder.stopped:  # the last characters completed a stop string
            self.finish_reason = "stop"
        self.stream.completion_tokens = len(self.tokens)
        if last:
            end = decoder.released if decoder.stopped else float("inf")
            self._last = AnswerPiece(text, tuple(t for t, start in self._unsent if start < end), self.finish_reason)
        elif text:
            ready = tuple(t for t, _ in self._unsent) if decoder.whole else ()
            self._unsent = [] if ready else self._unsent
            self.stream.put(AnswerPiece(text, ready))

    def send_last(self) -> None:
        """Send the last piece, once."""
        if self._last is not None:
            self.stream.put(self._last)
            self._last = None

    def _spelling(self, token: int) -> tuple[str, bytes]:
        assert self._vocabulary is not None
        raw = self._vocabulary.bytes_of(token)
        return raw.decode("utf-8", errors="replace"), raw


def features_of(generations: Iterable[Generation]) -> dict[str, list[Tensor]]:
    """Features of all media by kind, in the order of their placeholders; all must have been encoded."""
    features: dict[str, list[Tensor]] = {}
    for generation in generations:
        for kind, media in generation.prompt.media.items():
            features.setdefault(kind, []).extend(m.features for m in media if m.features is not None)
    return features


def choose_tokens(generations: Iterable[Generation], logits: Tensor) -> None:
    """One more token for each answer that isn't done, from its row of the logits (B, V)."""
    likeliest = logits.argmax(-1).tolist()
    for generation, row, token in zip(generations, logits, likeliest, strict=True):
        if generation.done:
            continue
        if generation.sampler.plain:
            generation.take(token)
        else:
            generation.choose(row)
