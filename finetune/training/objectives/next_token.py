"""Cross-entropy of the answer's tokens; heads with weights learn by losses of their own."""

from typing import TYPE_CHECKING, Any

from finetune.common.registry import PartOptions
from finetune.recipe.parts import Needs
from finetune.training.objectives import BatchLoss

if TYPE_CHECKING:
    from finetune.model.composite import MultimodalModel
    from finetune.training.collate import Batch

NEEDS: Needs = "answers"
REFERENCE = False
HEADS = True
SEPARABLE = True
FIGURES: tuple[str, ...] = ()


class Options(PartOptions):
    pass


def loss(model: Any, composite: "MultimodalModel", batch: "Batch", options: Options) -> BatchLoss | None:
    """Where losses are weighted, their sum over tokens and samples, with how many tokens and labels are right: numbers
    and sets of labels aren't right or wrong. Else trl's own.
    """
    if "heads" not in batch:
        return None
    inputs = {key: value for key, value in batch.items() if key not in ("heads", "loss_weights", "items")}
    rows = {name: head["rows"] for name, head in batch["heads"].items()}
    outputs = model(**inputs, head_rows=rows, use_cache=False, fused_lm_head=True)
    total = -(outputs.log_probs * batch["loss_weights"]).sum()
    right, count = float(outputs.is_top1.sum()), int(outputs.label_mask.sum())
    for name, head in batch["heads"].items():
        scores, binding = composite.head_scores[name], composite.bindings[name]
        losses = binding.head.module.loss(
            scores, head["targets"], head["groups"], binding.settings, binding.head.options
        )
        total = total + (losses * head["weights"]).sum()
        if scores.shape[1] > 1 and not binding.settings.several:
            right += float((scores.argmax(1) == head["targets"].argmax(1)).sum())
            count += len(scores)
    return BatchLoss(total, batch["items"], right, count, auxiliary=outputs.aux_loss)
