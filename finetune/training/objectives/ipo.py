"""Identity preference optimization: the log-ratios of a pair, means over tokens, are pulled to a fixed distance, so
that unambiguous preferences aren't learned without bound (Azar et al. 2023, https://arxiv.org/abs/2310.12036).
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._preferences import PAIR_FIGURES, REFERENCE_FIGURES, answers_of, pair_loss

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "pairs"
REFERENCE = True
HEADS = False
SEPARABLE = True
FIGURES = PAIR_FIGURES + REFERENCE_FIGURES


class Options(PartOptions):
    beta: float = Field(
        0.1,
        gt=0,
        description="Regularization: the target distance of log-ratios is 1 / (2 beta), in nats per token.",
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answers' cross-entropy, in nats per token, in the loss."
    )


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    answers = answers_of(model, batch)
    ratios = answers.ratios / answers.tokens
    distance = ratios[answers.of("chosen")] - ratios[answers.of("rejected")]
    losses = (distance - 1 / (2 * options.beta)).square()
    return pair_loss(answers, losses, options.beta * answers.ratios, options.sft_weight)
