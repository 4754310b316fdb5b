"""Values in words, by hand."""

from finetune.evaluation.report import words


def test_values_in_words():
    assert [words.number(value) for value in (None, float("nan"), 0.62601, 1234, 12345.678, True)] == [
        "–", "–", "0.626", "1,234", "12,345.7", "True",
    ]  # fmt: skip
    assert [words.duration(value) for value in (3.21, 119, 150, 7345)] == [
        "3.2 s",
        "119.0 s",
        "2 min 30 s",
        "2 h 02 min",
    ]
    assert words.readable({"label": "猫", "probabilities": {"猫": 0.9, "狗": 0.1}}) == "猫 (90%)"
    assert words.readable(["a", "b"]) == "a, b" and words.readable({"总额": 3}) == "总额: 3"
    assert words.readable({"行": [1, 2.5], "a": None, "b": True}) == "行: 1, 2.500, a: none, b: true"
    boxes = [{"label": "猫", "box": [1, 2, 30, 40]}, {"label": "", "box": [0, 0, 5, 5]}]
    assert words.readable(boxes) == "猫 (1, 2, 30, 40); box (0, 0, 5, 5)" and words.readable([]) == ""


def test_shares_are_read_in_percent():
    assert [words.value("accuracy", value) for value in (0, 0.0044, 0.1264, 0.626, 0.996, 1.0)] == [
        "0%", "0.4%", "13%", "63%", "99.6%", "100%",
    ]  # fmt: skip
    assert words.value("word_error_rate", 1.302) == "130%" and words.value("mean_absolute_error", 0.5) == "0.500"
    assert words.span("exact_match", 0.561, 0.683) == "56–68%" and words.span("iou", 0.1, 0.25) == "0.100–0.250"


def test_metrics_and_conditions_have_names():
    assert [words.plain(name) for name in ("vqa_accuracy", "token_f1", "ndcg@10", "word_error_rate", "probe")] == [
        "VQA accuracy", "token F1", "NDCG@10", "word error rate", "probe",
    ]  # fmt: skip
    assert [words.condition(name) for name in ("tuned", "base", "blank_image", "odd_one")] == [
        "trained", "untrained", "blank pictures", "odd one",
    ]  # fmt: skip
    assert words.meaning("blank_audio") == "after training, with blank recordings" and words.meaning("odd_one") == ""
