"""Imitate the LLM's answers to captions or transcripts of the media, by KL divergence, instead of the rows' answers."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "texts"
REFERENCE = False
HEADS = False
FIGURES: tuple[str, ...] = ()


class Options(PartOptions):
    answers: Literal["own", "given"] = Field(
        "own", description="Answers to imitate: the LLM's own answers to the text (own), or those of the rows (given)."
    )
    temperature: float = Field(2.0, gt=0, description="Softmax temperature of both distributions.")
    max_new_tokens: int = Field(32, ge=1, description="Length limit of an own answer, in tokens.")


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss:
    """The KL divergence from the teacher over the answer's tokens: see `MultimodalModel.imitate`."""
    from finetune.model.composite import Teacher

    outputs = model(**{**batch, "teacher": Teacher(batch["teacher"], options.temperature)})
    count = batch["label_rows"].numel()
    return BatchLoss(outputs["loss"], count, float(outputs["agreement"]), count)
