"""A number from the LLM's last state: a rating, the probability of a click, or the score by which the rows of a group
are ranked.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.sample import Answer
from finetune.model.heads import HeadSettings, Target

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = True


class Options(PartOptions):
    loss: Literal["squared", "logistic", "pairwise"] = Field(
        "squared",
        description="squared: squared distance to the target; logistic: cross-entropy, for targets that are "
        "probabilities in 0..1; pairwise: the more relevant of two rows of a group scores higher (RankNet).",
    )


def settings(targets: Iterable[Target], options: Options) -> HeadSettings:
    """The squared loss scales targets to mean 0 and deviation 1, so that one learning rate fits all."""
    from statistics import fmean, pstdev

    numbers = [_number(target) for target in targets]
    if options.loss == "logistic" and not all(0 <= number <= 1 for number in numbers):
        raise DataError(
            f"head: loss 'logistic' takes targets from 0 to 1; the training rows hold {min(numbers):g} to "
            f"{max(numbers):g}"
        )
    if options.loss != "squared":
        return HeadSettings(mean=0.0, deviation=1.0)
    return HeadSettings(mean=fmean(numbers), deviation=pstdev(numbers) or 1.0)


def encode(target: Target, settings: HeadSettings) -> list[float]:
    mean, deviation = settings.scale
    return [(_number(target) - mean) / deviation]


def build(width: int, settings: HeadSettings, options: Options) -> "nn.Module":
    from torch import nn

    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))


def loss(scores: "Tensor", targets: "Tensor", groups: "Tensor", settings: HeadSettings, options: Options) -> "Tensor":
    """Pairwise: a row's mean over the less relevant rows of its group (Burges et al. 2005, Learning to rank using
    gradient descent).
    """
    from torch.nn import functional

    predicted, expected = scores[:, 0], targets[:, 0]
    if options.loss == "squared":
        return (predicted - expected) ** 2
    if options.loss == "logistic":
        return functional.binary_cross_entropy_with_logits(predicted, expected, reduction="none")
    better = (groups[:, None] == groups) & (expected[:, None] > expected)
    losses = functional.softplus(predicted - predicted[:, None]) * better
    return losses.sum(1) / better.sum(1).clamp(min=1)


def answer(scores: list[float], settings: HeadSettings, options: Options) -> Answer:
    import math

    mean, deviation = settings.scale
    number = scores[0] * deviation + mean
    if options.loss == "logistic":
        number = 1 / (1 + math.exp(-max(min(number, 60.0), -60.0)))
    return Answer(text=f"{number:.4g}", number=number)


def _number(target: Target) -> float:
    return float(target["relevance"] if isinstance(target, dict) else target)
