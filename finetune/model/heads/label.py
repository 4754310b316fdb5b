"""A linear layer on the LLM's last state: a probability for each label, with one right label per row or several."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
        description="Weight the loss so that rare and frequent labels count alike; with several labels per row, so "
        "that the presence of each label counts as much as its absence.",
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target that is spread over all labels.")


def settings(targets: Iterable[str | list[str]], options: Options) -> HeadSettings:
    several, rows, counts = False, 0, Counter[str]()
    for target in targets:
        several, rows = several or isinstance(target, list), rows + 1
        counts.update(_labels_of(target))
    labels = tuple(sorted(counts))
    if len(labels) < 2:
        raise DataError(
            f"head: the training rows must hold at least two labels; they hold {', '.join(labels) or 'none'}"
        )
    if not options.balanced:
        return HeadSettings(labels=labels, several=several)
    shares = [counts[label] / rows for label in labels]
    weights = [(1 - share) / share if several else 1 / (share * len(labels)) for share in shares]
    return HeadSettings(labels=labels, several=several, weights=tuple(round(weight, 6) or 1.0 for weight in weights))


def encode(target: str | list[str], settings: HeadSettings) -> list[float]:
    labels = _labels_of(target)
    if unknown := sorted({*labels} - {*settings.labels}):
        raise DataError(f"label {unknown[0]!r} is in no training row")
    return [float(label in labels) for label in settings.labels]


def build(width: int, settings: HeadSettings, options: Options) -> "nn.Module":
    from torch import nn

    # The size of last states differs between LLMs by orders of magnitude: normalised, one learning rate fits all.
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(settings.labels)))


def loss(scores: "Tensor", targets: "Tensor", groups: "Tensor", settings: HeadSettings, options: Options) -> "Tensor":
    """Cross-entropy; with several labels per row, the mean of the labels' binary cross-entropies."""
    from torch.nn import functional

    weights = scores.new_tensor(settings.weights or [1.0] * scores.shape[1])
    if settings.several:
        smooth = targets * (1 - options.smoothing) + options.smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(scores, smooth, reduction="none")
        return (losses * (targets * weights + 1 - targets)).mean(1)
    smooth = targets * (1 - options.smoothing) + options.smoothing / scores.shape[1]
    return -(smooth * scores.log_softmax(1)).sum(1) * (targets * weights).sum(1)


def answer(scores: list[float], settings: HeadSettings, options: Options) -> Answer:
    import math

    if settings.several:
        shares = [1 / (1 + math.exp(-max(min(score, 60.0), -60.0))) for score in scores]
        return Answer(probabilities=dict(zip(settings.labels, shares, strict=True)))
    highest = max(scores)
    exponentials = [math.exp(score - highest) for score in scores]
    shares = [exponential / sum(exponentials) for exponential in exponentials]
    probabilities = dict(zip(settings.labels, shares, strict=True))
    return Answer(text=max(probabilities, key=lambda label: probabilities[label]), probabilities=probabilities)


def _labels_of(target: str | list[str]) -> list[str]:
    return target if isinstance(target, list) else [target]
