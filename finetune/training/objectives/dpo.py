"""Direct preference optimization: the chosen answer becomes more likely than the rejected one, by the ratio to the
weights that the stage began with (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._preferences import (
    PAIR_FIGURES,
    REFERENCE_FIGURES,
    answers_of,
    pair_loss,
    smoothed,
)

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "pairs"
REFERENCE = True
HEADS = False
SEPARABLE = True
FIGURES = PAIR_FIGURES + REFERENCE_FIGURES


class Options(PartOptions):
    beta: float = Field(0.1, gt=0, description="Inverse temperature: the larger, the closer to the reference.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of pairs whose chosen and rejected answers are swapped."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answers' cross-entropy, in nats per token, in the loss."
    )


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    answers = answers_of(model, batch)
    rewards = options.beta * answers.ratios
    margins = rewards[answers.of("chosen")] - rewards[answers.of("rejected")]
    return pair_loss(answers, smoothed(margins, options.label_smoothing), rewards, options.sft_weight)
