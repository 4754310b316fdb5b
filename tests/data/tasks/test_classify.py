import pytest
from sklearn.metrics import roc_auc_score
from task_rows import Asked

from finetune.common.errors import DataError
from finetune.data.sample import Answer
from finetune.data.tasks.classify import Options


def test_one_label_is_read_leniently_and_spelled_as_the_options_do(tmp_path):
    asked = Asked("classify", tmp_path, labels=["Red", "green", "红"])
    assert asked.read(" red. ") == "Red" and asked.read("红。") == "红" and asked.read("GREEN") == "green"
    assert asked.read("It is red") == "It is red" and asked.read("  ") is None
    sample = asked.sample(label=" RED ")
    assert sample.answer == "Red" and sample.target is None
    scores = asked.scores((sample, "red"), (asked.sample(label="红"), "红。"), (asked.sample(label="red"), "no idea"))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["balanced_accuracy"] == scores["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["precision"] == 1.0 and "exact_match" not in scores and "auroc" not in scores


@pytest.mark.parametrize("label", ["blue", "", None, ["Red"], "Red; green"])
def test_a_row_with_another_label_is_refused(tmp_path, label):
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'label'"):
        Asked("classify", tmp_path, labels=["Red", "green"]).sample(label=label)


def test_numbers_and_truths_of_json_are_labels(tmp_path):
    asked = Asked("classify", tmp_path)
    assert [asked.sample(label=label).answer for label in (3, True, 0.5)] == ["3", "true", "0.5"]


def test_several_labels_stand_in_order_each_once(tmp_path):
    asked = Asked("classify", tmp_path, separator=";")
    for label in ("dog; cat;dog ;", "dog；cat", ["dog", "cat"], '["cat", "dog"]'):
        sample = asked.sample(label=label)
        assert sample.answer == "cat; dog" and sample.target == ["cat", "dog"]
    assert asked.read("Dog ; cat.") == ["Dog", "cat."] and asked.read(";") is None
    scores = asked.scores((sample, "dog; cat."), (sample, "cat; rat"), (sample, ""))
    assert scores["accuracy"] == pytest.approx((1 + 1 / 3 + 0) / 3) and scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["f1_micro"] == pytest.approx(2 * 3 / (3 + 6)) and "balanced_accuracy" not in scores
    chinese = Asked("classify", tmp_path, separator="、")
    assert chinese.sample(label="猫、狗").answer == "狗、猫" and chinese.read("猫、狗。") == ["狗。", "猫"]
    assert chinese.scores((chinese.sample(label="猫、狗"), "猫、狗。"))["exact_match"] == 1.0
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'label'"):
        asked.sample(label=" ; ")


def test_probabilities_reach_the_scores(tmp_path):
    asked = Asked("classify", tmp_path)
    chances = {"cat": [0.7, 0.4, 0.2, 0.9], "dog": [0.3, 0.6, 0.8, 0.1]}
    right = ["cat", "cat", "dog", "dog"]
    samples = [asked.sample(label=label) for label in right]
    answers = [Answer(probabilities={label: chances[label][i] for label in chances}) for i in range(4)]
    assert asked.read(probabilities={"cat": 0.3, "dog": 0.7}) == {
        "label": "dog",
        "probabilities": {"cat": 0.3, "dog": 0.7},
    }
    scores = asked.scores(*zip(samples, answers, strict=True))
    assert scores["accuracy"] == 0.5
    expected = roc_auc_score([label == "cat" for label in right], chances["cat"])  # that of dog is the same
    assert scores["auroc"] == pytest.approx(expected)
    assert scores["calibration_error"] == pytest.approx((0.3 + 0.6 + 0.2 + 0.9) / 4)
    several = Asked("classify", tmp_path, separator=",")
    assert several.read(probabilities={"cat": 0.6, "dog": 0.5, "rat": 0.4})["label"] == ["cat", "dog"]
    joint = several.read("cat", probabilities={"cat": 0.4, "cat, dog": 0.35, "dog, rat": 0.25})  # of whole answers
    assert joint["label"] == ["cat", "dog"] and joint["probabilities"] == pytest.approx(
        {"cat": 0.75, "dog": 0.6, "rat": 0.25}
    )
    sample = several.sample(label="cat,dog")
    assert several.scores((sample, Answer(probabilities={"cat": 0.6, "dog": 0.5, "rat": 0.4})))["exact_match"] == 1.0
    assert several.scores((sample, Answer(probabilities={"cat": 0.1, "dog": 0.2})))["accuracy"] == 0.0


def test_tables_know_the_labels_of_the_head(tmp_path):
    asked = Asked("classify", tmp_path)
    rows = [asked.row(asked.sample(label="cat"), Answer(probabilities={"cat": 0.2, "dog": 0.5, "rat": 0.3}))]
    assert asked.task.tables(rows, asked.options)["confusion"] == {
        "labels": ["cat", "dog", "rat"],
        "counts": [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    }


def test_text_and_media_are_asked_about_together(tmp_path):
    asked = Asked("classify", tmp_path, media=[], text="review", prompt="好评还是差评？")
    assert asked.sample(label="好", review="很好吃").question[0].content == ("很好吃\n好评还是差评？",)
    with pytest.raises(DataError, match=r"rows\.csv:2: column 'review'"):
        asked.sample(label="好")


@pytest.mark.parametrize(
    "options",
    [{"labels": ["a", "A."]}, {"labels": ["a", " "]}, {"labels": [" a"]}, {"labels": ["a;b"], "separator": ";"}],
)
def test_labels_that_cannot_be_told_apart_are_refused(options):
    with pytest.raises(ValueError, match="labels"):
        Options(**options)
