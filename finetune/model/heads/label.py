"""A linear layer over the LLM's last state: a probability for each label, of one right label or of several."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.sample import Answer
from finetune.model.heads import HeadSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = True


class Options(PartOptions):
    balanced: bool = Field(
        False,
        description="All labels weigh alike, rare ones too; of several labels a row, each as much as its absence.",
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all labels.")


def settings(targets: list[Any], options: Options) -> HeadSettings:
    several = any(isinstance(target, list) for target in targets)
    chosen = [label for target in targets for label in (target if isinstance(target, list) else [target])]
    labels = sorted({*chosen})
    if len(labels) < 2:
        raise DataError(f"head: needs two labels in the training rows at least; there is {', '.join(labels) or 'none'}")
    weights: list[float] = []
    if options.balanced:
        shares = [chosen.count(label) / len(targets) for label in labels]
        weights = [(1 - share) / share if several else 1 / (share * len(labels)) for share in shares]
    rounded = tuple(round(weight, 6) or 1.0 for weight in weights)
    return HeadSettings(labels=tuple(labels), several=several, weights=rounded)


def encode(target: Any, settings: HeadSettings) -> list[float]:
    chosen = target if isinstance(target, list) else [target]
    if unknown := sorted({*chosen} - {*settings.labels}):
        raise DataError(f"label {unknown[0]!r} stands in no training row")
    return [float(label in chosen) for label in settings.labels]


def build(width: int, settings: HeadSettings, options: Options) -> "nn.Module":
    from torch import nn

    # The last state's length differs from LLM to LLM by orders of magnitude: normalised, one learning rate fits all.
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(settings.labels)))


def loss(scores: "Tensor", targets: "Tensor", groups: "Tensor", settings: HeadSettings, options: Options) -> "Tensor":
    """Cross-entropy; of several labels the mean over labels of the binary one."""
    from torch.nn import functional

    weights = scores.new_tensor(settings.weights or [1.0] * scores.shape[1])
    if settings.several:
        soft = targets * (1 - options.smoothing) + options.smoothing / 2
        each = functional.binary_cross_entropy_with_logits(scores, soft, reduction="none")
        return (each * (targets * weights + 1 - targets)).mean(1)
    soft = targets * (1 - options.smoothing) + options.smoothing / scores.shape[1]
    return -(soft * scores.log_softmax(1)).sum(1) * (targets * weights).sum(1)


def answer(scores: list[float], settings: HeadSettings, options: Options) -> Answer:
    import math

    if settings.several:
        found = [1 / (1 + math.exp(-max(min(score, 60.0), -60.0))) for score in scores]
        return Answer(probabilities=dict(zip(settings.labels, found, strict=True)))
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    found = [one / sum(exponentials) for one in exponentials]
    probabilities = dict(zip(settings.labels, found, strict=True))
    return Answer(text=max(probabilities, key=lambda label: probabilities[label]), probabilities=probabilities)
