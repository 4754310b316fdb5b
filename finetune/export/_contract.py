"""The types that `export_run` and the targets exchange."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from finetune.common import display
from finetune.common.errors import ExportRefused
from finetune.common.registry import PartOptions
from finetune.data.sample import Message

FIRST_TOKENS = 4  # of an answer: what `min_equal` counts

TokenIds = tuple[int, ...]


class TargetOptions(PartOptions):
    min_equal: float = Field(
        0.9,
        ge=0,
        le=1,
        description=f"Smallest share of questions whose first {FIRST_TOKENS} tokens must equal the merged model's; "
        "below it the export is refused.",
    )


@dataclass(frozen=True)
class MergedModel:
    """`folder`: what `finetune merge` wrote. `adapter`: the adapter folder of its run, if the run is known."""

    folder: Path
    adapter: Path | None = None

    def adapter_folder(self) -> Path:
        """Raises ExportRefused if there is no adapter."""
        if self.adapter is None:
            raise ExportRefused(f"{self.folder}: a merged folder has no adapter: name the run that it came from")
        if not (self.adapter / "adapter_config.json").is_file():
            raise ExportRefused(f"{self.adapter}: this run trained no adapter (`adapter: null`), only other parts")
        return self.adapter


@dataclass(frozen=True)
class Probe:
    """A conversation that ends with the user's turn, and the merged model's greedy `answer` without its end token.

    Pictures are PNG files and recordings 32-bit float WAV files at 16 kHz, so that engines are compared rather than
    decoders; videos are the original files.
    """

    messages: tuple[Message, ...]
    answer: TokenIds


@dataclass(frozen=True)
class ExportedModel:
    """`model_class`: a class of transformers, or an architecture of the engine; `reason`: why this one. In `notes` and
    `details` FOLDER stands for the folder of the export.
    """

    model_class: str
    reason: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, str | Mapping[str, str]] | None = None


@dataclass(frozen=True)
class EngineAnswers:
    """`engine`: name and version. `answers`: one per probe, without end tokens."""

    engine: str
    answers: tuple[TokenIds, ...]


@dataclass(frozen=True)
class Verification:
    """How many of `rows` answers of the engine equal the merged model's in their first tokens, and entirely.
    `different`: how many of the merged model's answers there are if equal ones count once: where all are the same,
    media may have had no part in them.
    """

    engine: str
    rows: int
    equal_first_tokens: int
    equal: int
    different: int


@dataclass(frozen=True, repr=False)
class ExportResult:
    """Exactly one of `verification` and `not_verified`, the reason for its absence, is set."""

    target: str
    model_class: str
    reason: str
    notes: tuple[str, ...]
    folder: Path
    verification: Verification | None
    not_verified: str | None

    def __repr__(self) -> str:
        return f"ExportResult: {self.target}, {self.model_class}; {self.comparison}; {self.folder}"

    @property
    def comparison(self) -> str:
        """What the comparison of the answers has come to, in a sentence."""
        if (checked := self.verification) is None:
            return f"not compared: {self.not_verified}"
        return (
            f"{checked.rows} answers in {checked.engine}: {checked.equal_first_tokens} begin with the merged model's "
            f"tokens, {checked.equal} are equal to the end"
        )

    def _repr_html_(self) -> str:
        lines = [f"{self.target}: {self.model_class} ({self.reason})", self.comparison, *self.notes]
        return "".join([*map(display.line, lines), display.files({"export": self.folder})])


class EngineMissing(Exception):
    """The engine isn't installed; the message says how to install it."""


class ExportTarget(Protocol):
    """A target file. `write` and `answer` receive an instance of the file's own `Options`, which `--option` sets.
    `COMPARED_MEDIA`: the kinds of media in the questions whose answers are compared; others are left out of them.
    """

    Options: type[TargetOptions]
    COMPARED_MEDIA: tuple[str, ...]

    def write(self, model: MergedModel, folder: Path, options: Any) -> ExportedModel:
        """Write the model into `folder`, which exists, is empty, and gets its final name only after verification.

        Raises ExportRefused with the reason if the engine can't run this model exactly as trained.
        """

    def answer(self, folder: Path, probes: Sequence[Probe], options: Any, max_new_tokens: int) -> EngineAnswers:
        """Answer the probes greedily in the engine, in a separate process.

        Raises EngineMissing if the engine isn't installed, and ExportRefused if it fails.
        """


def without_end(token_ids: Sequence[int], end_ids: Sequence[int]) -> TokenIds:
    return tuple(token_ids[:-1] if token_ids and token_ids[-1] in end_ids else token_ids)
