"""Boxes [x1, y1, x2, y2] against the right ones. torchmetrics ranks boxes by confidence, which answers don't have; here
each row has exact one-to-one pairs, and sums that are fast to resample.
"""

from collections.abc import Sequence
from typing import Any

from finetune.data.metrics import Measures, Rows, means

Box = Sequence[float]
OVERLAP = 0.5  # intersection over union from which a box is a hit


def matched(predicted: Sequence[Box], right: Sequence[Box], allowed: Sequence[Sequence[bool]]) -> Measures:
    """The measures of one row for `box_scores`. Boxes are paired one to one, with the largest sum of overlaps;
    `allowed` says of each predicted and each right box whether they may be a pair.

    "iou", also "good": the mean overlap of the pairs, boxes without a partner on either side counting as 0.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    most = max(len(predicted), len(right))
    iou, hits = 1.0 if most == 0 else 0.0, 0
    if predicted and right:
        overlaps = overlap(np.array(predicted, dtype=np.float64), np.array(right, dtype=np.float64)) * np.array(allowed)
        iou = float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / most)
        near = overlaps >= OVERLAP
        hits = int(near[linear_sum_assignment(near, maximize=True)].sum())
    correct = float(hits == len(predicted) == len(right))
    counts = {"hits": hits, "predicted": len(predicted), "right": len(right)}
    return {"good": iou, "iou": iou, f"accuracy@{OVERLAP}": correct, **counts}


def box_scores(rows: Rows) -> dict[str, float]:
    """iou and accuracy@0.5 (every box is a hit, and there are no others), means over rows; f1@0.5 over the boxes of all
    rows, left out if there are none.
    """
    scores = means(rows, ("iou", f"accuracy@{OVERLAP}"))
    hits, boxes = sum(row["hits"] for row in rows), sum(row["predicted"] + row["right"] for row in rows)
    return scores | ({f"f1@{OVERLAP}": 2 * hits / boxes} if boxes else {})


def overlap(left: Any, right: Any) -> Any:
    """Intersection over union of (N, 4) and (M, 4) boxes: (N, M); 0 for boxes without area."""
    import numpy as np

    corner = np.maximum(left[:, None, :2], right[None, :, :2])
    shared = np.clip(np.minimum(left[:, None, 2:], right[None, :, 2:]) - corner, 0, None).prod(-1)
    left_area, right_area = (np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (left, right))
    union = left_area[:, None] + right_area - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
