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
    assert words.readable({"行": [1], "a": None}) == '{"行": [1], "a": null}'
