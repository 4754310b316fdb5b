from itertools import permutations

import numpy as np
import pytest

from finetune.data.metrics.boxes import box_scores, matched, overlap


def every(said, right):
    return matched(said, right, [[True] * len(right) for _ in said])


def test_overlap_is_that_of_counted_cells():
    generator = np.random.default_rng(0)
    boxes = np.sort(generator.integers(0, 20, (2, 8, 2, 2)), axis=2).transpose(0, 1, 2, 3).reshape(2, 8, 4)
    for i, left in enumerate(boxes[0]):
        for j, right in enumerate(boxes[1]):
            cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (left, right)]
            union = len(cells[0] | cells[1])
            expected = len(cells[0] & cells[1]) / union if union else 0.0
            assert overlap(boxes[0].astype(float), boxes[1].astype(float))[i, j] == pytest.approx(expected)


def test_boxes_are_paired_for_the_most_overlap():
    generator = np.random.default_rng(1)
    for _ in range(20):
        said, right = (np.hstack([corner, corner + 10]) for corner in generator.integers(0, 12, (2, 3, 2)))
        table = overlap(said.astype(float), right.astype(float))
        row = every(said.tolist(), right.tolist())
        assert row["iou"] == pytest.approx(
            max(sum(table[i, j] for i, j in enumerate(p)) for p in permutations(range(3))) / 3
        )
        assert row["hits"] == max(sum(table[i, j] >= 0.5 for i, j in enumerate(p)) for p in permutations(range(3)))


def test_by_hand():
    box, half, far = [0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]
    assert every([half], [box]) == {"good": 0.5, "iou": 0.5, "accuracy@0.5": 1.0, "hits": 1, "predicted": 1, "right": 1}
    assert every([box, far], [box]) | {"good": 0.5, "iou": 0.5, "accuracy@0.5": 0.0} == every([box, far], [box])
    assert every([far, box], [box, far])["accuracy@0.5"] == 1.0
    assert every([], []) == {"good": 1.0, "iou": 1.0, "accuracy@0.5": 1.0, "hits": 0, "predicted": 0, "right": 0}
    assert every([], [box])["iou"] == every([box], [])["iou"] == 0.0
    assert every([[5, 5, 5, 5]], [[5, 5, 5, 5]])["iou"] == 0.0
    assert matched([box], [box], [[False]])["hits"] == 0
    scores = box_scores([every([box, far], [box]), every([half], [box]), every([far], [box])])
    assert scores == {
        "iou": pytest.approx(1 / 3),
        "accuracy@0.5": pytest.approx(1 / 3),
        "f1@0.5": pytest.approx(2 * 2 / (3 + 1 + 2 + 1)),
    }
    assert "f1@0.5" not in box_scores([every([], [])])
