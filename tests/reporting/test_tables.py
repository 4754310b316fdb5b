"""Tables of a report, by hand."""

from finetune.reporting.tables import calibration, confusion


def test_calibration_by_hand():
    def row(label, target, sure):
        return {"tuned": {"label": label, "probabilities": {label: sure, "other": 1 - sure}}, "target": target}

    rows = [
        row("a", "a", 0.91),
        row("a", "b", 0.97),
        row("b", "b", 0.55),
        row("b", "b", 1.0),
        {"tuned": "a", "target": "a"},
    ]
    found = calibration(rows)
    assert [(round(sure, 3), round(right, 3), count) for sure, right, count in found] == [
        (0.55, 1.0, 1),
        (0.96, 0.667, 3),
    ]


def test_confusion_keeps_answers_that_are_no_label():
    found = confusion({"confusion": {"labels": ["a", "b"], "counts": [[3, 1, 0], [0, 2, 2]]}})
    assert found["columns"] == ["a", "b", "none of them"]
    assert found["rows"][1] == ("b", 4, [(0, 0.0, False), (2, 0.5, True), (2, 0.5, False)])
    assert found["pairs"] == [("b", "none of them", 2), ("a", "b", 1)]
    assert confusion({"confusion": {"labels": ["a", "b"], "counts": [[3, 1, 0], [0, 2, 0]]}})["columns"] == ["a", "b"]
