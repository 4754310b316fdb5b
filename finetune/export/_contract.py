"""What every target is given, and what it gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.sample import Message


@dataclass(frozen=True)
class Source:
    """`merged`: a folder that `finetune merge` wrote. `adapter`: that of its run, if there is a run."""

    merged: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Probe:
    """A conversation that ends on the user's turn, and what the merged model answers to it, greedily: token ids without
    the end token, and their text.
    """

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Written:
    """`loads_as`: a class of transformers, or an architecture of the engine. `notes`: what else one should know."""

    loads_as: str
    why: str
    notes: tuple[str, ...] = ()
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answered:
    """`engine`: its name and version. `answers`: one a probe, as token ids, or as text where that is all it tells."""

    engine: str
    answers: tuple[tuple[int, ...] | str, ...]


class EngineMissing(Exception):
    """The target isn't installed here; the text says how to install it."""
