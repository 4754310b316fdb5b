"""What the HTTP app asks of the engine, and what it gets: plain values, no torch."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune.data.sample import Answer, Message


class Busy(Exception):
    """The queue is full; `retry_after_seconds` tells when there will likely be room."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class TimedOut(Exception):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Request:
    """One answer to one conversation that ends on the user's turn. `temperature` 0 is greedy. `logprobs`: None, or how
    many alternatives to tell of each token (0: only the token's own). `schema`: JSON schema that the answer must
    satisfy; {} is any JSON. `strength`: as in `Assistant.answer`.
    """

    model: str
    messages: tuple[Message, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
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
class Piece:
    """Text that has become certain since the last piece: whole characters, nothing of a stop string. The last piece has
    a `finish_reason`: 'stop', 'length'.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


class Stream(Protocol):
    """Pieces of one answer, to be read in an event loop. Iterating raises DataError for what can't be read, TimedOut,
    MemoryError, or Busy before the first piece. `prompt_tokens`, `completion_tokens`, `cached_tokens` are known once
    the first piece has come.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def __aiter__(self) -> AsyncIterator[Piece]: ...
    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Stats:
    """`counters` only grow: requests, tokens, hits and misses of caches; `gauges` are now: running, waiting, bytes."""

    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """`models`: {name: {"media": kinds it takes, "tasks": {name: {"head", "labels" or None}}, "context": tokens or
    None, "path": where from}}.
    """

    models: Mapping[str, Mapping[str, Any]]

    @property
    def alive(self) -> bool:
        """Whether it has been started, and still answers."""
        ...

    def start(self) -> None: ...
    def submit(self, request: Request) -> Stream:
        """Raises Busy, and DataError for an unknown model."""
        ...

    async def ask(self, model: str, task: str, messages: tuple[Message, ...], timeout_seconds: float) -> Answer:
        """What `task`'s labels or score head say. Raises Busy, TimedOut, DataError."""
        ...

    def stats(self) -> Stats: ...
    def stop(self, drain_seconds: float) -> None:
        """Take nothing new, finish what runs within the time, then end."""
        ...
