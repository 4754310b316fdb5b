"""A number off the LLM's last state: a rating, the chance of a click, or what the rows of a group are ranked by."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.sample import Answer
from finetune.model.heads import HeadSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = True


class Options(PartOptions):
    loss: Literal["squared", "logistic", "pairwise"] = Field(
        "squared",
        description="squared: the distance to the number; logistic: the target is a chance in 0..1; pairwise: of two "
        "rows of a group the better one gets more (RankNet).",
    )


def settings(targets: list[Any], options: Options) -> HeadSettings:
    """Numbers are learnt with mean 0 and deviation 1: the size of the target doesn't change the learning rate."""
    from statistics import fmean, pstdev

    numbers = [_number(target) for target in targets]
    if options.loss == "logistic" and not all(0 <= number <= 1 for number in numbers):
        raise DataError(f"head: loss 'logistic' takes numbers of 0 to 1; got {min(numbers):g} to {max(numbers):g}")
    if options.loss != "squared":
        return HeadSettings(mean=0.0, deviation=1.0)
    return HeadSettings(mean=fmean(numbers), deviation=pstdev(numbers) or 1.0)


def encode(target: Any, settings: HeadSettings) -> list[float]:
    return [(_number(target) - settings.mean) / settings.deviation]


def build(width: int, settings: HeadSettings, options: Options) -> "nn.Module":
    from torch import nn

    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))


def loss(scores: "Tensor", targets: "Tensor", groups: "Tensor", settings: HeadSettings, options: Options) -> "Tensor":
    """Pairwise: the mean over the rows of the group that are worse than a row (Burges et al. 2005, Learning to rank
    using gradient descent).
    """
    from torch.nn import functional

    given, wanted = scores[:, 0], targets[:, 0]
    if options.loss == "squared":
        return (given - wanted) ** 2
    if options.loss == "logistic":
        return functional.binary_cross_entropy_with_logits(given, wanted, reduction="none")
    better = (groups[:, None] == groups) & (wanted[:, None] > wanted)
    each = functional.softplus(given - given[:, None]) * better
    return each.sum(1) / better.sum(1).clamp(min=1)


def answer(scores: list[float], settings: HeadSettings, options: Options) -> Answer:
    import math

    number = scores[0] * settings.deviation + settings.mean
    if options.loss == "logistic":
        number = 1 / (1 + math.exp(-max(min(number, 60.0), -60.0)))
    return Answer(text=f"{number:.4g}", number=number)


def _number(target: Any) -> float:
    return float(target["relevance"] if isinstance(target, dict) else target)
