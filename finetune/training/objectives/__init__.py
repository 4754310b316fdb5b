"""Objectives: what a stage minimises. Each file is an `ObjectiveContract` and imports no torch at module level."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch


@dataclass(frozen=True)
class BatchLoss:
    """`total`: the loss summed over `items`, a scalar with its gradient. The trainer divides it by the items of all
    batches and processes of an optimizer step. `right` of `count` tokens and labels are predicted. `figures`: means
    over the items, or over `weight` of them where that is another number, by the names in the file's `FIGURES`.
    `auxiliary`: that of an LLM's routers, a mean over the batch's tokens, not yet weighted.
    """

    total: "Tensor"
    items: int
    right: float
    count: int
    figures: Mapping[str, float] = field(default_factory=dict)
    weight: int | None = None
    auxiliary: "Tensor | None" = None


class ObjectiveContract(Protocol):
    """What the file of an objective defines."""

    NEEDS: Needs  # what it needs of each row, unless its options have `needs`
    REFERENCE: bool  # whether it needs log-probabilities under the initial weights: `batch["compared"]["reference"]`
    HEADS: bool  # whether heads with weights learn by it
    FIGURES: tuple[str, ...]  # what is logged in each step besides the loss and the accuracy
    Options: type[PartOptions]

    # Optional: SEPARABLE = True, where the loss of a batch is the sum of those of its samples, or of those that are
    # compared, so that a batch that is too large for the memory may be computed in pieces.
    # With `NEEDS` "prompts" also `items_of(options, tokens, answers) -> int`: what a batch with so many sampled
    # answers, of so many tokens together, adds to the items.

    def loss(self, model: Any, composite: "MultimodalModel", batch: "Batch", options: Any) -> BatchLoss | None:
        """The loss of a batch. `model` is to be called: `composite` as accelerate wraps it, with trl's fused head that
        gives `log_probs` (1, K) of the K learned tokens. None: trl's own cross-entropy. All of `batch` that isn't the
        objective's own goes on to the model: it asks for the auxiliary loss of routers, where trl adds one.
        """
