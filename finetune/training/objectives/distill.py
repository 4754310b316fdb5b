"""Distillation: imitate the LLM's own outputs on captions or transcripts of the media, or the outputs of another model,
the teacher, on the media, instead of learning the rows' answers.
"""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.recipe.schema import PATH_OR_HUB_ID_TO_TRAIN, Quantize
from finetune.training.objectives import BatchLoss

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "texts"
REFERENCE = False
HEADS = False
SEPARABLE = True
FIGURES: tuple[str, ...] = ()


class Options(PartOptions):
    teacher: str | None = Field(
        None,
        description="The teacher: a run, a merged or adapter folder, a model of transformers that takes media, or the "
        "Hub id of one of these; null: the LLM itself.",
        json_schema_extra=PATH_OR_HUB_ID_TO_TRAIN,
    )
    revision: str | None = Field(None, description="Commit, branch or tag of a teacher on the Hub.")
    quantize: Quantize = Field(
        "none",
        description="Storage of the frozen weights of an untuned teacher; others are loaded as trained.",
    )
    by: Literal["kl", "answers"] = Field(
        "kl",
        description="Outputs of a teacher to imitate: its next-token distributions, which needs the LLM's "
        "vocabulary (kl), or its answers (answers).",
    )
    answers: Literal["own", "given"] = Field(
        "own",
        description="Answers to imitate: those that the LLM, reading the text, or the teacher writes (own), or those "
        "of the rows (given).",
    )
    temperature: float = Field(2.0, gt=0, description="Softmax temperature of both distributions.")
    top_k: int = Field(
        64, ge=1, description="Most likely tokens stored of each of a teacher's distributions; all others count as one."
    )
    max_new_tokens: int = Field(
        32, ge=1, description="Length limit of an answer that the LLM or the teacher writes, in tokens."
    )

    @property
    def needs(self) -> Needs:
        return "texts" if self.teacher is None else "teacher"

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if self.by == "answers" and self.teacher is None:
            raise ValueError("by: answers is for a teacher: name one, or leave it out.")
        if self.by == "answers" and self.answers == "given":
            raise ValueError("a teacher has no part in the rows' own answers: write answers: own, or by: kl.")
        return self


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss | None:
    """The KL divergence from the LLM that reads text (`finetune.model.imitation`), or from another model
    (`TeacherDistributions.divergence`), over the answer's tokens; trl's cross-entropy of a teacher's answers.
    """
    from finetune.model.imitation import Teacher
    from finetune.model.teacher_distributions import TeacherDistributions

    if options.by == "answers":
        return None
    inputs: Any = dict(batch)
    distributions = inputs.pop("distributions", None)
    text = None if distributions is not None else Teacher(batch["teacher"], options.temperature)
    teacher = text or TeacherDistributions(**distributions, temperature=options.temperature)
    outputs = model(**{**inputs, "teacher": teacher})
    count = batch["label_rows"].numel()
    return BatchLoss(outputs["loss"], count, float(outputs["agreement"]), count)
