"""Boxes [x1, y1, x2, y2] against the right ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.metrics import means

Box = Sequence[float]
OVERLAP = 0.5  # from which a box counts as found


def matched(said: Sequence[Box], right: Sequence[Box], alike: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """A row of `box_scores`. Boxes are paired one to one, so that their overlaps sum up to the most there can be; only
    those that are `alike`, (said, right) -> whether they may be.

    "iou", also "good": the mean overlap of the pairs, boxes without a partner on either side counting as 0.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    most = max(len(said), len(right))
    iou, hits = 1.0 if most == 0 else 0.0, 0
    if said and right:
        overlaps = overlap(np.array(said, dtype=np.float64), np.array(right, dtype=np.float64)) * np.array(alike)
        iou = float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / most)
        found = overlaps >= OVERLAP
        hits = int(found[linear_sum_assignment(found, maximize=True)].sum())
    correct = float(hits == len(said) == len(right))
    counts = {"hits": hits, "said": len(said), "right": len(right)}
    return {"good": iou, "iou": iou, f"accuracy@{OVERLAP}": correct, **counts}


def box_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """iou and accuracy@0.5 (all boxes found and no other), means over rows; f1@0.5 over the boxes of all rows, left out
    where there are none.
    """
    scores = means(rows, ("iou", f"accuracy@{OVERLAP}"))
    hits, boxes = sum(row["hits"] for row in rows), sum(row["said"] + row["right"] for row in rows)
    return scores | ({f"f1@{OVERLAP}": 2 * hits / boxes} if boxes else {})


def overlap(left: Any, right: Any) -> Any:
    """Intersection over union of (N, 4) and (M, 4) boxes, (N, M); 0 of boxes without area."""
    import numpy as np

    corner = np.maximum(left[:, None, :2], right[None, :, :2])
    shared = np.clip(np.minimum(left[:, None, 2:], right[None, :, 2:]) - corner, 0, None).prod(-1)
    left_area, right_area = (np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (left, right))
    union = left_area[:, None] + right_area - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
