"""Odds ratio preference optimization: the cross-entropy of the chosen answer, and the ratio of its odds to those of the
rejected one, without a reference (Hong et al. 2024, https://arxiv.org/abs/2403.07691).
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
FIGURES = PAIR_FIGURES


class Options(PartOptions):
    beta: float = Field(0.1, gt=0, description="Weight of the odds ratio beside the cross-entropy.")


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    answers = answers_of(model, batch)
    means = answers.means.clamp(max=-1e-6)  # an answer known by heart has infinite odds
    log_odds = means - (-means.expm1()).log()
    margins = log_odds[answers.of("chosen")] - log_odds[answers.of("rejected")]
    return pair_loss(answers, options.beta * smoothed(margins, 0.0), options.beta * answers.means, sft_weight=1.0)
