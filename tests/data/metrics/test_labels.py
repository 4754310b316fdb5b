import random

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.preprocessing import MultiLabelBinarizer

from finetune.data.metrics.labels import (
    auroc,
    calibration_error,
    fold,
    label_scores,
    label_tables,
    labelled,
    probability_scores,
    with_probabilities,
)

LABELS = ["cat", "dog", "猫", "狗"]
chance = random.Random(0)


def test_case_spaces_and_a_full_stop_are_forgiven_and_nothing_else():
    assert fold(" Red. ") == fold("red") == fold("RED") and fold("红。") == fold("红")
    assert len({fold(label) for label in ("red", "red!", "a red", "re d", "green", "rot", "红", "红色")}) == 8
    assert fold(".") == "."


def test_scores_of_one_label_are_those_of_sklearn():
    right = [chance.choice(LABELS) for _ in range(200)]
    said = [label if chance.random() < 0.5 else chance.choice([*LABELS, "none of them"]) for label in right]
    rows = [labelled([one], [other]) for one, other in zip(said, right, strict=True)]
    scores = label_scores(rows)
    for average, names in (("macro", ("precision", "recall", "f1")), ("micro", (None, None, "f1_micro"))):
        expected = sk.precision_recall_fscore_support(right, said, labels=LABELS, average=average, zero_division=0)
        for name, value in zip(names, expected, strict=False):
            assert name is None or scores[name] == pytest.approx(value)
    known = [one in LABELS for one in said]
    expected = sk.balanced_accuracy_score(np.array(right)[known], np.array(said)[known])
    fewer = label_scores([row for row, keep in zip(rows, known, strict=True) if keep])
    assert fewer["recall"] == pytest.approx(expected)
    table = label_tables(rows, [], several=False)
    columns = [*sorted(LABELS), "none of them"]
    assert table["confusion"]["labels"] == sorted(LABELS)
    assert table["confusion"]["counts"] == sk.confusion_matrix(right, said, labels=columns)[:-1].tolist()
    report = sk.classification_report(right, said, labels=LABELS, output_dict=True, zero_division=0)
    for label in LABELS:
        found = table["per_label"][label]
        assert [found[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [report[label][key] for key in ("precision", "recall", "f1-score", "support")]
        )


def test_scores_of_several_labels_are_those_of_sklearn():
    right = [chance.sample(LABELS, chance.randint(1, 4)) for _ in range(200)]
    said = [chance.sample([*LABELS, "x"], chance.randint(0, 4)) for _ in range(200)]
    rows = [labelled(one, other) for one, other in zip(said, right, strict=True)]
    to_matrix = MultiLabelBinarizer(classes=[*LABELS, "x"]).fit_transform
    truth, guess = to_matrix(right), to_matrix(said)
    scores = label_scores(rows)
    for key, average in (("f1", "macro"), ("f1_micro", "micro")):
        expected = sk.f1_score(truth[:, :4], guess[:, :4], average=average, zero_division=0)
        assert scores[key] == pytest.approx(expected)
    expected = sk.jaccard_score(truth, guess, average="samples")
    assert np.mean([row["good"] for row in rows]) == pytest.approx(expected)
    assert np.mean([row["exact_match"] for row in rows]) == pytest.approx(sk.accuracy_score(truth, guess))
    assert label_tables(rows, LABELS, several=True).keys() == {"per_label"}


def test_area_under_the_curve_is_that_of_sklearn_with_ties():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (80, 4)) / 6
    truth = np.eye(4, dtype=bool)[generator.integers(0, 3, 80)]  # nobody has the last label
    expected = np.mean([sk.roc_auc_score(truth[:, c], scores[:, c]) for c in range(3)])
    assert auroc(scores, truth) == pytest.approx(expected)
    assert auroc(scores, np.ones_like(truth)) is None
    assert auroc(truth.astype(float), truth) == 1.0 and auroc(-truth.astype(float), truth) == 0.0


def test_calibration_error_by_hand():
    # Two answers in the bin of 0.9: one right, |0.5 - 0.9|; one in that of 0.6: right, |1 - 0.6|.
    found = calibration_error(np.array([0.9, 0.9, 0.6]), np.array([True, False, True]))
    assert found == pytest.approx((2 * 0.4 + 0.4) / 3)
    # 0.6 is the upper end of the ninth of fifteen bins.
    assert calibration_error(np.array([0.6, 0.61]), np.array([True, False])) == pytest.approx((0.4 + 0.61) / 2)
    assert calibration_error(np.array([0.59, 0.6]), np.array([True, False])) == pytest.approx(abs(1 - 1.19) / 2)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0
    sure = np.random.default_rng(0).random(200_000)
    assert calibration_error(sure, np.random.default_rng(1).random(200_000) < sure) < 0.01


def test_probabilities_are_of_the_likeliest_label_or_of_each():
    rows = [
        with_probabilities(labelled(["a"], ["A."]), {"a": 0.8, "b": 0.2}),
        with_probabilities(labelled(["b"], ["a"]), {"a": 0.4, "b": 0.6}),
    ]
    one = probability_scores(rows, several=False)
    assert one == {"calibration_error": pytest.approx((0.2 + 0.6) / 2)}  # all are a's: no curve
    # a: 0.8 and 0.4, both right; b: 0.2 and 0.6, both not; each in a bin of its own.
    each = probability_scores(rows, several=True)
    assert each["calibration_error"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.6) / 4)
    assert probability_scores([*rows, labelled(["a"], ["a"])], several=False) == {}


def test_a_label_that_is_none_of_them_stands_in_the_last_column():
    rows = [labelled(["sofa"], ["Cat"]), labelled([], ["dog"]), labelled(["CAT."], ["cat"])]
    table = label_tables(rows, ("Cat", "dog", "rat"), several=False)
    assert table["confusion"] == {"labels": ["Cat", "dog", "rat"], "counts": [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]}
    assert table["per_label"]["rat"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
