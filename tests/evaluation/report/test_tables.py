"""Tables of a report, by hand."""

from finetune.data.predictions import Prediction
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.tables import ConfusionCell, Cost, calibration, confusion_matrix, costs
from finetune.evaluation.results import Confusion, Metrics, TrainingResult


def test_calibration_by_hand():
    def answered(tuned, target):
        return Prediction("t", "a:1", (), "", target, {"tuned": tuned})

    def row(label, target, sure):
        return answered({"label": label, "probabilities": {label: sure, "other": 1 - sure}}, target)

    rows = [
        row("a", "a", 0.91),
        row("a", "b", 0.97),
        row("b", "b", 0.55),
        row("b", "b", 1.0),
        answered("a", "a"),
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


def test_energy_of_a_run_that_was_resumed_is_said_to_begin_there():
    for resumed, title in ((False, "Energy"), (True, "Energy (training since the last --resume)")):
        metrics = Metrics(train=TrainingResult(resumed=resumed), seconds={"train": 25.0})
        content = Content("run", None, metrics, [], {}, {}, None, {}, {}, [], [])
        time, _, energy = costs(content)
        assert time == Cost("Time", [("train", "25.0 s")]) and energy.title == title
