import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from finetune.data.metrics.captions import caption_counts, caption_scores

ENGLISH = ["a", "red", "blue", "the", "cat", "dog", "sat", "on", "mat", "grass", "with", ",", "."]
# What pycocoevalcap 1.2 prints for `corpus`, its words spaced, by language and references; "1-3": as many as a row has.
CIDER = {
    ("13a", 1): 2.07323997300729,
    ("13a", 3): 1.2011238355091425,
    ("13a", "1-3"): 1.8856234058920327,
    ("zh", 1): 2.0215211074188675,
    ("zh", 3): 1.1305100674710349,
}
CHINESE = list("一只红色的猫坐在草地上和狗，。")


def corpus(vocabulary: list[str], gap: str, references: int, rows: int = 60) -> list[tuple[str, list[str]]]:
    chance = random.Random(0)
    texts = [
        [gap.join(chance.choices(vocabulary, k=chance.randint(1, 14))) for _ in range(references + 1)]
        for _ in range(rows)
    ]
    return [(right[0] if chance.random() < 0.3 else said, right) for said, *right in texts]


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("vocabulary, gap, tokenizer", [(ENGLISH, " ", "13a"), (CHINESE, "", "zh")])
def test_scores_are_those_of_the_published_scripts(vocabulary, gap, tokenizer, references):
    data = corpus(vocabulary, gap, references)
    scores = caption_scores([caption_counts(said, right) for said, right in data])
    said, streams = [said for said, _ in data], list(zip(*[right for _, right in data], strict=True))
    bleu = BLEU(tokenize=tokenizer, effective_order=True).corpus_score(said, streams).score
    assert scores["bleu"] == pytest.approx(bleu / 100)
    assert scores["chrf"] == pytest.approx(CHRF().corpus_score(said, streams).score / 100)
    assert scores["cider"] == pytest.approx(CIDER[tokenizer, references] / 10)
    assert 0.01 < scores["cider"] < 0.9 and 0.05 < scores["bleu"] < 0.9


def test_as_many_references_as_a_row_has():
    data = [(said, right[: 1 + i % 3]) for i, (said, right) in enumerate(corpus(ENGLISH, " ", 3))]
    scores = caption_scores([caption_counts(said, right) for said, right in data])
    streams = [[right[i] if i < len(right) else None for _, right in data] for i in range(3)]
    bleu = BLEU(effective_order=True).corpus_score([said for said, _ in data], streams).score
    assert scores["bleu"] == pytest.approx(bleu / 100)
    assert scores["cider"] == pytest.approx(CIDER["13a", "1-3"] / 10)


def test_the_same_and_nothing():
    right = ["a red cat on the mat", "two dogs ran in green grass", "一只猫坐在桌子上"]
    same = caption_scores([caption_counts(text, [text]) for text in right])
    assert same == {"bleu": pytest.approx(1.0), "chrf": pytest.approx(1.0), "cider": pytest.approx(1.0)}
    nothing = caption_scores([caption_counts("", [text]) for text in right])
    assert nothing == {"bleu": 0.0, "chrf": 0.0, "cider": 0.0}
    alone = caption_scores([caption_counts(right[0], right[:1])])  # every word is in every row: none tells anything
    assert alone == {"bleu": pytest.approx(1.0), "chrf": pytest.approx(1.0), "cider": 0.0}
    assert np.isfinite([*caption_scores([caption_counts("，", ["。"])]).values()]).all()
