import random

import jiwer
import pytest
from rouge_score.rouge_scorer import RougeScorer

from finetune.data.metrics.text import edits, free_text, rouge_l, token_f1, words

VOCABULARY = ["a", "red", "the", "cat", "sat", "on", "mats"]
chance = random.Random(0)


def sentences(count: int) -> list[str]:
    return [" ".join(chance.choices(VOCABULARY, k=chance.randint(1, 12))) for _ in range(count)]


def test_words():
    assert words("Two RED cats, it's 3.") == ["two", "red", "cats", "it", "s", "3"]
    assert words("两只Cat，2只狗。") == ["两", "只", "cat", "2", "只", "狗"]
    assert words("Ａ１ cafe\u0301") == ["a1", "café"] and words("ネコ 한국") == ["ネ", "コ", "한", "국"]
    assert words("，。!?") == []


def test_longest_common_subsequence_is_that_of_rouge():
    scorer = RougeScorer(["rougeL"])
    for said, right in zip(sentences(100), sentences(100), strict=True):
        expected = scorer.score(right, said)["rougeL"].fmeasure
        assert rouge_l(words(said), words(right)) == pytest.approx(expected)
    assert rouge_l(words("猫坐在桌上"), words("猫在桌子上")) == pytest.approx(2 * 4 / 10)


def test_words_in_common():
    assert token_f1(words("the red cat"), words("a red cat")) == pytest.approx(2 / 3)
    assert token_f1(words("红猫"), words("红色的猫")) == pytest.approx(2 * 2 / 6)
    assert token_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    assert token_f1([], []) == 1.0 and token_f1([], ["a"]) == token_f1(["a"], []) == 0.0


def test_the_nearest_reference_counts():
    row = free_text("a cat", ["two dogs", "a cat", "a black cat"])
    assert row == {"good": 1.0, "exact_match": 1.0, "token_f1": 1.0, "rouge_l": 1.0}
    assert free_text("A cat.", ["a cat"])["exact_match"] == 0.0
    assert free_text("", ["a cat"]) == {"good": 0.0, "exact_match": 0.0, "token_f1": 0.0, "rouge_l": 0.0}


def test_edits_sum_up_to_the_rates_of_jiwer():
    said, right = [*sentences(60), "", "x y"], [*sentences(60), "the cat", "z"]
    counts = [edits(one, other) for one, other in zip(said, right, strict=True)]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    assert total["word_edits"] / total["words"] == pytest.approx(jiwer.wer(right, said))
    joined = [["".join(text.split()) for text in texts] for texts in (right, said)]
    assert total["character_edits"] / total["characters"] == pytest.approx(jiwer.cer(*joined))


def test_edits_of_chinese_and_of_nothing():
    assert edits("今天天汽好", "今天，天气很好！") == {
        "words": 6,
        "cjk": 6,
        "characters": 6,
        "word_edits": 2,
        "character_edits": 2,
    }
    keys = ("words", "cjk", "characters", "word_edits", "character_edits")
    assert edits("两只 CAT", "两只cat。") == dict(zip(keys, (3, 2, 5, 0, 0), strict=True))
    assert edits("a bc", "?!") == dict(zip(keys, (0, 0, 0, 2, 3), strict=True))
    assert edits("", "ab c") == dict(zip(keys, (2, 0, 3, 2, 3), strict=True))
