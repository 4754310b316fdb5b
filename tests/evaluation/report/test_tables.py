"""Tables of a report, by hand."""

from finetune.evaluation.report.tables import ConfusionCell, calibration, confusion_matrix
from finetune.evaluation.results import Confusion, Prediction


def test_calibration_by_hand():
    def row(label, target, sure):
        tuned = {"label": label, "probabilities": {label: sure, "other": 1 - sure}}
        return Prediction.parse({"tuned": tuned, "target": target})

    rows = [
        row("a", "a", 0.91),
        row("a", "b", 0.97),
        row("b", "b", 0.55),
        row("b", "b", 1.0),
        Prediction.parse({"tuned": "a", "target": "a"}),
    ]
    assert [(round(sure, 3), round(right, 3), count) for sure, right, count in calibration(rows)] == [
        (0.55, 1.0, 1),
        (0.96, 0.667, 3),
    ]


def test_confusion_keeps_answers_that_are_no_label():
    matrix = confusion_matrix(Confusion(labels=["a", "b"], counts=[[3, 1, 0], [0, 2, 2]]))
    assert matrix.columns == ["a", "b", "none of them"]
    second = matrix.rows[1]
    assert (second.label, second.total) == ("b", 4)
    assert second.cells == [ConfusionCell(0, 0.0, False), ConfusionCell(2, 0.5, True), ConfusionCell(2, 0.5, False)]
    assert matrix.pairs == [("b", "none of them", 2), ("a", "b", 1)]
    assert confusion_matrix(Confusion(labels=["a", "b"], counts=[[3, 1, 0], [0, 2, 0]])).columns == ["a", "b"]
    assert confusion_matrix(Confusion()) is None
