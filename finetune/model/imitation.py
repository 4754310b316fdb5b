"""A composite that imitates another model at the tokens of answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.model.language_model import without_adapter
from finetune.model.teacher_distributions import TeacherDistributions


@dataclass(frozen=True)
class Teacher:
    """What the LLM reads in place of media: keywords of `MultimodalModel.forward`, with `label_rows`; `temperature`
    softens its answers.
    """

    batch: Mapping[str, Any]
    temperature: float


def imitate(model: Any, student: Mapping[str, Any], teacher: Teacher | TeacherDistributions) -> dict[str, Tensor]:
    """Distance of the LLM that sees media from the LLM that reads their text, at the tokens of the answers; or from
    another model's distributions.

    `model`: a `MultimodalModel`; `student`: keywords of its `forward`, with as many `label_rows` (K,) as the
    teacher's; the teacher without adapter. Returns `loss`, the KL divergence of next-token distributions softened by
    the temperature, summed over K (Ultravox, https://github.com/fixie-ai/ultravox), and `agreement`: on how many of K
    the most likely tokens are equal.
    """
    if isinstance(teacher, TeacherDistributions):
        logits = model.label_logits(**student)
        return {"loss": teacher.divergence(logits), "agreement": teacher.agreement(logits)}
    training = model.training
    with torch.no_grad(), without_adapter(model.language_model):
        target = model.eval().label_logits(**teacher.batch)
    logits = model.train(training).label_logits(**student)
    loss = functional.kl_div(
        (logits / teacher.temperature).log_softmax(-1),
        (target / teacher.temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    return {"loss": loss, "agreement": (logits.argmax(-1) == target.argmax(-1)).sum()}
