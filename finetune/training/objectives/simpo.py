"""Simple preference optimization: mean log-probabilities per token are compared, without a reference (Meng et al.
2024, https://arxiv.org/abs/2405.14734).
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._preferences import PAIR_FIGURES, answers_of, pair_loss, smoothed

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "pairs"
REFERENCE = False
HEADS = False
SEPARABLE = True
FIGURES = PAIR_FIGURES


class Options(PartOptions):
    beta: float = Field(2.0, gt=0, description="Factor of the mean log-probabilities.")
    gamma: float = Field(
        1.0,
        ge=0,
        description="Target margin between chosen and rejected answer, in units of the scaled log-probabilities.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of pairs whose chosen and rejected answers are swapped."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answers' cross-entropy, in nats per token, in the loss."
    )


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    answers = answers_of(model, batch)
    rewards = options.beta * answers.means
    margins = rewards[answers.of("chosen")] - rewards[answers.of("rejected")] - options.gamma
    return pair_loss(answers, smoothed(margins, options.label_smoothing), rewards, options.sft_weight)
