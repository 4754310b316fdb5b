"""Heads read the answer from the LLM's last hidden state at the end of the question. Each file is a `HeadContract`, or
with weights of its own a `TrainedHeadContract`, and imports no torch at module level.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions
from finetune.data.sample import Answer

if TYPE_CHECKING:
    from torch import Tensor, nn

Target = Any
"""What the task scores a sample's prediction against: text, a list of labels, a number, or a dict with "relevance"."""


class HeadSettings(BaseModel):
    """What a head learned from the targets of the training rows. Saved as `model_dump(exclude_unset=True)`: the fields
    that its kind of head sets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: tuple[str, ...] = ()  # in the order of the scores; none: the head gives no probabilities
    several: bool = False  # whether a sample may have several labels, or none
    weights: tuple[float, ...] = ()  # in the loss, per label; none: all 1
    mean: float | None = None  # of the training targets, and their deviation: only set by heads that give a number
    deviation: float | None = None

    @property
    def scale(self) -> tuple[float, float]:
        """(mean, deviation). Raises ModelError if the head gives no number."""
        if self.mean is None or self.deviation is None:
            raise ModelError("this head's settings have no mean and deviation: it doesn't give numbers")
        return self.mean, self.deviation

    @property
    def free_text(self) -> bool:
        """Whether answers are neither probabilities nor numbers."""
        return not self.labels and self.deviation is None


class HeadContract(Protocol):
    """What the file of a head defines."""

    TRAINED: bool  # whether it has weights, which a stage trains as 'heads'; it is then a `TrainedHeadContract`
    Options: type[PartOptions]

    def settings(self, targets: Iterable[Target], options: Any) -> HeadSettings:
        """What to learn from the training rows: from their targets, or for a head without weights from the text of
        their answers, which come one by one, once. Raises DataError.
        """


class TrainedHeadContract(HeadContract, Protocol):
    """What the file of a head with weights also defines."""

    def build(self, width: int, settings: HeadSettings, options: Any) -> "nn.Module":
        """A module from last hidden states (K, width) to scores (K, outputs), both float32."""

    def encode(self, target: Target, settings: HeadSettings) -> list[float]:
        """What `loss` compares the scores of one sample with: `outputs` numbers. Raises DataError."""

    def loss(
        self, scores: "Tensor", targets: "Tensor", groups: "Tensor", settings: HeadSettings, options: Any
    ) -> "Tensor":
        """Scores and encoded targets (K, outputs), and each sample's group as an integer (K,) -> losses (K,)."""

    def answer(self, scores: list[float], settings: HeadSettings, options: Any) -> Answer:
        """The answer that the scores of one sample mean."""
