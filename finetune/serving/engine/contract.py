"""What the HTTP app and an engine exchange: plain values, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.sample import Message

MEBIBYTE = 2**20
JsonSchema = Mapping[str, object]


class Busy(Exception):
    """There is no room for the request; `retry_after_seconds` estimates when there will be."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class TimedOut(Exception):
    """A request took longer than its time limit."""


class EngineLimits(PartOptions):
    """Sizes of an engine."""

    max_batch: int = Field(32, ge=1, description="Answers of a model generated at a time.")
    max_batch_tokens: int = Field(65_536, ge=1, description="Tokens of these answers, prompts and padding included.")
    prefill_tokens: int = Field(4096, ge=1, description="Prompt tokens read between two steps, or a single prompt.")
    queue_limit: int = Field(128, ge=0, description="Waiting requests; further ones get 429.")
    media_cache_bytes: int = Field(256 * MEBIBYTE, ge=0, description="Cache of media features, bytes; 0 turns it off.")
    media_waiting_bytes: int = Field(
        1024 * MEBIBYTE, ge=1, description="Decoded media that wait, bytes; further ones get 429."
    )
    prefix_cache_bytes: int = Field(
        256 * MEBIBYTE, ge=0, description="Cache of prompt prefixes, bytes; 0 turns it off."
    )


@dataclass(frozen=True)
class Request:
    """One answer to a conversation that ends on the user's turn.

    temperature: 0 is greedy
    stop: non-empty strings
    logprobs: None, or the number of alternatives to report for each token; 0 reports the chosen token alone
    schema: the JSON schema of the answer; {} allows any object
    strength: as in `Assistant.answer`
    """

    model: str
    messages: tuple[Message, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: JsonSchema | None = None
    strength: float | Mapping[str, float] | None = None
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class Token:
    """A token's text and bytes, its log-probability (nats), and the likeliest alternatives (text, bytes, nats)."""

    text: str
    raw: bytes
    logprob: float
    alternatives: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """The next final text of an answer: whole characters, no part of a stop string. The last piece has a
    `finish_reason`, 'stop' or 'length'.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Stats:
    """`counters` only grow: requests, tokens, cache hits and misses. `gauges` are current values."""

    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskInfo:
    """The head of a task that a model was trained on, its labels, if it has any, and its question; '' where each row
    had a question of its own.
    """

    head: str
    labels: tuple[str, ...] | None = None
    prompt: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """The kinds of media that a model accepts, its tasks by name, and its context length in tokens, if limited."""

    media: tuple[str, ...]
    tasks: Mapping[str, TaskInfo]
    context: int | None
