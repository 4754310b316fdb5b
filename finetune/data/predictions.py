"""predictions.jsonl: what a model answered to each held-out row, under each condition."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import write_text
from finetune.data.sample import Medium, Message, Sample


@dataclass(frozen=True)
class Prediction:
    """One row. `answers`: {condition: prediction}, as JSON holds it; `good`: how good the tuned one is, more is better;
    None where it isn't known.
    """

    task: str
    row: str
    media: tuple[Medium, ...]
    question: str
    target: Any
    answers: dict[str, Any] = field(default_factory=dict)
    good: float | None = None

    @classmethod
    def of(cls, sample: Sample, target: Any) -> "Prediction":
        """Without answers yet."""
        question = " ".join(p for m in sample.question for p in m.content if isinstance(p, str))
        return cls(sample.task, sample.where, sample.media, question, target)

    @property
    def tuned(self) -> Any:
        """The trained model's prediction; None where there is none."""
        return self.answers.get("tuned")

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The question as a conversation: media first."""
        return (Message("user", (*self.media, self.question)),)

    def as_json(self) -> dict[str, Any]:
        row = {
            "task": self.task,
            "row": self.row,
            "media": [str(medium.path) for medium in self.media],
            "kinds": [medium.kind for medium in self.media],
            "question": self.question,
            "target": self.target,
            **self.answers,
        }
        return row if self.good is None else {**row, "good": self.good}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Prediction":
        """Raises KeyError, TypeError or ValueError for another kind of row."""
        media = tuple(Medium(str(kind), Path(path)) for kind, path in zip(row["kinds"], row["media"], strict=True))
        known = {"task", "row", "media", "kinds", "question", "target", "good"}
        answers = {key: value for key, value in row.items() if key not in known}
        good = None if row.get("good") is None else float(row["good"])
        return cls(str(row["task"]), str(row["row"]), media, str(row["question"]), row["target"], answers, good)


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    write_text(path, "".join(json.dumps(one.as_json(), ensure_ascii=False) + "\n" for one in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """Raises ArtifactError, with the line, where one is damaged."""
    predictions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            predictions.append(Prediction.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}:{number} is damaged ({error!r}): run `finetune evaluate` again") from None
    return predictions
