import pytest
from sklearn.metrics import ndcg_score
from task_rows import Asked

from finetune.common.errors import DataError
from finetune.data.sample import Answer
from finetune.data.tasks.rank import Options
from finetune.evaluation.uncertainty import ScoredRows

TEXTS = {"history": "买过鳄梨", "item": "台球"}


def test_a_row_asks_for_one_item_of_a_group(tmp_path):
    asked = Asked("rank", tmp_path, relevant="是", irrelevant="否", prompt="会点击吗？")
    sample = asked.sample(group=7, relevance="1", **TEXTS)
    assert sample.question[0].content == ("买过鳄梨\n台球\n会点击吗？",) and sample.answer == "是"
    assert sample.group == "7" and sample.target == {"group": "7", "relevance": 1.0}
    assert asked.sample(group=7, relevance=False, **TEXTS).answer == "否"
    assert asked.sample(group=7, relevance=3, **TEXTS).target["relevance"] == 3.0


@pytest.mark.parametrize("columns", [{"relevance": "-1"}, {"relevance": "yes"}, {"relevance": ""}, {"group": ""}])
def test_rows_without_a_group_or_a_relevance_are_refused(tmp_path, columns):
    with pytest.raises(DataError, match=rf"rows\.csv:2: column '{next(iter(columns))}'"):
        Asked("rank", tmp_path).sample(**{"group": "u", "relevance": 1, **TEXTS, **columns})


def test_what_heads_say_becomes_a_number(tmp_path):
    asked = Asked("rank", tmp_path)
    assert asked.read("Yes.") == 1.0 and asked.read("no") == 0.0 and asked.read("maybe") is None
    assert asked.read("0.3", number=-2.5) == -2.5 and asked.read(number=float("inf")) is None
    assert asked.read("no", probabilities={"no": 0.2, "yes": 0.3, "x": 0.5}) == pytest.approx(0.6)
    assert asked.read(probabilities={"x": 1.0}) is None
    relevant, other = (asked.sample(group="u", relevance=r, **TEXTS) for r in (1, 0))
    assert asked.row(relevant, Answer(number=0.7))["good"] == 0.7
    assert asked.row(other, Answer(number=0.7))["good"] == pytest.approx(0.3)
    assert asked.row(other, Answer("?"))["good"] == asked.row(relevant, Answer("?"))["good"] == 0.0


def test_groups_are_ranked_by_it_and_drawn_whole(tmp_path):
    asked = Asked("rank", tmp_path, k=2)
    numbers = {"u": [(0.9, 0), (0.5, 1), (0.1, 0)], "v": [(3.0, 2), (1.0, 1)], "w": [(0.1, 0), (0.2, 0)]}
    rows = [
        asked.row(asked.sample(group=group, relevance=relevance, **TEXTS), Answer(number=number))
        for group, items in numbers.items()
        for number, relevance in items
    ]
    scores = asked.task.score(rows, asked.options)
    expected = [ndcg_score([[r for _, r in numbers[g]]], [[n for n, _ in numbers[g]]], k=2) for g in "uv"]
    assert scores["ndcg@2"] == pytest.approx(sum(expected) / 2)
    assert scores["mrr"] == 0.75 and scores["hit_rate@2"] == 1.0 and scores["auroc"] == 0.5
    assert asked.task.tables(rows, asked.options) == {"groups": {"groups": 3, "ranked": 2, "with_both": 1}}
    scored = ScoredRows(rows, lambda drawn: asked.task.score(drawn, asked.options), seed=0)
    assert (scored.units, scored.right, scored.interval("mrr")) == (3, {}, None)  # three groups tell nothing


def test_the_two_answers_differ():
    with pytest.raises(ValueError, match="irrelevant"):
        Options(relevant="yes", irrelevant="Yes.")
