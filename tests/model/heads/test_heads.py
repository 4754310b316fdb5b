"""The heads' losses against closed forms and other libraries."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from finetune.common.errors import DataError, ModelError
from finetune.common.registry import load_part, part_names
from finetune.model.heads import HeadSettings, label, language, score

TRAINED = [name for name in part_names("heads") if load_part("heads", name).TRAINED]
TARGETS = {"label": ["red", "blue", "red", "green"], "score": [1.0, 5.0, 2.5, 4.0]}


@pytest.mark.parametrize("name", TRAINED)
def test_a_head_gives_one_loss_a_sample_and_an_answer_that_json_can_hold(name):
    import json

    part = load_part("heads", name)
    options = part.Options()
    learned = part.settings(TARGETS[name], options)
    settings = HeadSettings.model_validate_json(learned.model_dump_json(exclude_unset=True))
    assert settings == learned and not settings.free_text
    targets = torch.tensor([part.encode(target, settings) for target in TARGETS[name]])
    module = part.build(8, settings, options)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    scores = module(100 * torch.randn(4, 8))
    assert scores.shape == targets.shape
    losses = part.loss(scores, targets, torch.zeros(4, dtype=torch.long), settings, options)
    assert losses.shape == (4,) and (losses >= 0).all()
    answer = part.answer(scores[0].tolist(), settings, options)
    assert json.dumps([answer.text, answer.probabilities, answer.number])
    empty = part.loss(scores[:0], targets[:0], torch.zeros(0, dtype=torch.long), settings, options)
    assert empty.shape == (0,)


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_head_has_learned_by_heart_is_what_it_answers(name):
    """The loss falls to nothing on scores that say the target, and these are read as it."""
    part = load_part("heads", name)
    options = part.Options()
    settings = part.settings(TARGETS[name], options)
    targets = torch.tensor([part.encode(target, settings) for target in TARGETS[name]])
    scores = targets if name == "score" else 50 * targets
    losses = part.loss(scores, targets, torch.arange(4), settings, options)
    torch.testing.assert_close(losses, torch.zeros(4), atol=1e-6, rtol=0)
    answers = [part.answer(row, settings, options) for row in scores.tolist()]
    assert [one.number or one.text for one in answers] == pytest.approx(TARGETS[name], abs=1e-5)


def test_one_label_is_cross_entropy():
    settings = label.settings(["b", "a", "c", "a"], label.Options())
    assert settings.model_dump(mode="json", exclude_unset=True) == {"labels": ["a", "b", "c"], "several": False}
    scores, numbers = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    targets = functional.one_hot(numbers, 3).float()
    for smoothing in (0.0, 0.2):
        ours = label.loss(scores, targets, numbers, settings, label.Options(smoothing=smoothing))
        theirs = functional.cross_entropy(scores, numbers, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs)
    answer = label.answer(scores[0].tolist(), settings, label.Options())
    assert list(answer.probabilities.values()) == pytest.approx(scores[0].softmax(0).tolist())
    assert answer.text == "abc"[int(scores[0].argmax())]


def test_rare_labels_weigh_more_where_it_is_asked_for():
    settings = label.settings(["a", "a", "a", "b"], label.Options(balanced=True))
    assert settings.weights == pytest.approx([1 / 1.5, 1 / 0.5], abs=1e-5)
    scores, targets = torch.zeros(4, 2), torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    losses = label.loss(scores, targets, torch.zeros(4), settings, label.Options(balanced=True))
    assert float(losses[:3].sum()) == pytest.approx(float(losses[3]), abs=1e-5)  # both labels pull alike
    assert float(losses.mean()) == pytest.approx(math.log(2), abs=1e-5)


def test_a_label_among_several_weighs_as_much_as_its_absence():
    """The best constant is one half, however rare the label is: weighed, presence and absence pull alike."""
    targets = [["a"], [], [], [], ["a", "b"], [], [], []]
    settings = label.settings(targets, label.Options(balanced=True))
    encoded = torch.tensor([label.encode(target, settings) for target in targets])
    scores = torch.zeros(8, 2, requires_grad=True)
    losses = label.loss(scores, encoded, torch.zeros(8), settings, label.Options(balanced=True))
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(2), atol=1e-5, rtol=0)


def test_several_labels_are_binary_cross_entropy():
    settings = label.settings([["a"], ["a", "b"], []], label.Options())
    assert settings == HeadSettings(labels=("a", "b"), several=True)
    scores = torch.randn(3, 2)
    targets = torch.tensor([label.encode(target, settings) for target in (["a"], ["b", "a"], [])])
    assert targets.tolist() == [[1, 0], [1, 1], [0, 0]]
    theirs = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1)
    torch.testing.assert_close(label.loss(scores, targets, targets, settings, label.Options()), theirs)
    answer = label.answer([800.0, -800.0], settings, label.Options())
    assert answer.probabilities == pytest.approx({"a": 1.0, "b": 0.0})


def test_a_label_of_no_training_row_is_refused():
    settings = label.settings(["a", "b"], label.Options())
    with pytest.raises(DataError, match="'z' is in no training row"):
        label.encode("z", settings)
    with pytest.raises(DataError, match="at least two labels"):
        label.settings(["a", "a"], label.Options())


def test_numbers_are_learned_with_mean_0_and_deviation_1():
    targets = [10.0, 20.0, 60.0]
    settings = score.settings(targets, score.Options())
    encoded = torch.tensor([score.encode(target, settings)[0] for target in targets])
    assert float(encoded.mean()) == pytest.approx(0, abs=1e-6)
    assert float(encoded.pow(2).mean()) == pytest.approx(1, abs=1e-6)
    assert score.encode(7.0, score.settings([7.0, 7.0], score.Options())) == [0.0]  # all alike: nothing is divided by 0


def test_pairs_are_compared_inside_their_group_alone():
    options = score.Options(loss="pairwise")
    settings = score.settings([{"relevance": 1.0}, {"relevance": 0.0}], options)
    scores, relevance, groups = torch.randn(6), torch.tensor([2.0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2])
    losses = score.loss(scores[:, None], relevance[:, None], groups, settings, options)
    for i in range(6):
        worse = [j for j in range(6) if groups[j] == groups[i] and relevance[j] < relevance[i]]
        pairs = [math.log(1 + math.exp(float(scores[j] - scores[i]))) for j in worse]
        assert float(losses[i]) == pytest.approx(sum(pairs) / max(len(pairs), 1), abs=1e-5)
    for order in itertools.permutations(range(3)):  # the right order costs least
        own = torch.tensor([3.0 - place for place in order])[:, None]
        cost = float(score.loss(own, torch.tensor([[2.0], [1.0], [0.0]]), torch.zeros(3), settings, options).sum())
        assert cost >= float(
            score.loss(
                torch.tensor([[3.0], [2.0], [1.0]]),
                torch.tensor([[2.0], [1.0], [0.0]]),
                torch.zeros(3),
                settings,
                options,
            ).sum()
        )


def test_a_chance_is_read_as_one():
    options = score.Options(loss="logistic")
    settings = score.settings([0.0, 1.0, 0.25], options)
    assert score.answer([0.0], settings, options).number == 0.5
    losses = score.loss(torch.tensor([[0.3]]), torch.tensor([[0.25]]), torch.zeros(1), settings, options)
    chance = 1 / (1 + math.exp(-0.3))
    assert float(losses[0]) == pytest.approx(-0.25 * math.log(chance) - 0.75 * math.log(1 - chance), abs=1e-6)
    with pytest.raises(DataError, match="0 to 1"):
        score.settings([3.0, 1.0], options)


def test_labels_are_read_as_no_number():
    with pytest.raises(ModelError, match="no mean and deviation"):
        score.answer([0.0], HeadSettings(labels=("a", "b")), score.Options())


def test_the_language_head_knows_labels_where_it_is_asked_to():
    assert language.settings(["b", "a", "b"], language.Options()) == HeadSettings()
    assert HeadSettings().free_text and HeadSettings().model_dump(exclude_unset=True) == {}
    assert language.settings(["b", "a", "b"], language.Options(answers="labels")) == HeadSettings(labels=("a", "b"))
    with pytest.raises(DataError, match="1,001 different answers"):
        language.settings([str(number) for number in range(1001)], language.Options(answers="labels"))
