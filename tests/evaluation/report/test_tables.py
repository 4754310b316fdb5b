"""Tables of a report, by hand."""

from types import SimpleNamespace

from finetune.evaluation.report.tables import calibration, confusion, merged


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


def test_the_certificate_is_shown_where_it_can_be_read():
    measures = {"kl": 0.25, "agreement": 0.9, "scores": {"mood": {"f1": 0.5}}}
    certificate = {"format": 1, "merged_into": "it", "candidates": {"it": measures}, "primary": {"mood": "f1"}}
    columns, rows = merged(SimpleNamespace(certificate=certificate))
    assert columns[1] == "KL (nats)" and columns[-1] == "mood.f1"
    assert rows[1] == ["merged into it (kept)", "0.25", "90.0%", "", "", "0.500"]
    assert merged(SimpleNamespace(certificate={})) is None
    assert merged(SimpleNamespace(certificate={"format": 1, "candidates": []})) is None
