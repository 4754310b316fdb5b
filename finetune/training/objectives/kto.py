"""Kahneman-Tversky optimization: single answers, each desirable or not, by the ratio to the weights that the stage
began with (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306).
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss
from finetune.training.objectives._preferences import REFERENCE_FIGURES, answers_of

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "unpaired"
REFERENCE = True
HEADS = False
FIGURES = ("reward_desirable", "reward_undesirable", "kl_of_others", *REFERENCE_FIGURES)


class Options(PartOptions):
    beta: float = Field(0.1, gt=0, description="Inverse temperature: the larger, the closer to the reference.")
    desirable_weight: float = Field(1.0, ge=0, description="Factor of the losses of desirable answers.")
    undesirable_weight: float = Field(1.0, ge=0, description="Factor of the losses of undesirable answers.")


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    """As in trl, rewards count from an estimate of the KL divergence: the mean log-ratio of answers to other questions
    (role "other"), at least 0. It is the batch's own in each process.
    """
    answers = answers_of(model, batch)
    good, bad, others = (answers.of(role) for role in ("desirable", "undesirable", "other"))
    zero = answers.by_token.sum() * 0.0
    if not others:
        return BatchLoss(zero, 0, 0.0, 0, auxiliary=answers.auxiliary)
    ratios = answers.ratios
    divergence = ratios[others].detach().mean().clamp(min=0)
    losses = 1 - (options.beta * (ratios[good] - divergence)).sigmoid()
    bad_losses = 1 - (options.beta * (divergence - ratios[bad])).sigmoid()
    total = options.desirable_weight * (losses * answers.weights[good]).sum()
    total = total + options.undesirable_weight * (bad_losses * answers.weights[bad]).sum()
    rewards = options.beta * ratios.detach()
    means = {"reward_desirable": good, "reward_undesirable": bad}
    figures = {name: float(rewards[numbers].mean()) for name, numbers in means.items() if numbers}
    figures |= {"kl_of_others": float(divergence), "kl": answers.kl}
    items, learned = len(good) + len(bad), answers.by_token.numel()
    return BatchLoss(total, items, answers.right, learned, figures, auxiliary=answers.auxiliary)
