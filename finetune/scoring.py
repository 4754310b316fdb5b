"""Scores that several tasks share."""

import re
from collections import Counter


def free_text(predictions: list[str], targets: list[str]) -> dict[str, float]:
    """What answers in one's own words are scored by."""
    return {"exact_match": exact_match(predictions, targets), "token_f1": token_f1(predictions, targets)}


def exact_match(predictions: list[str], targets: list[str]) -> float:
    """Share of answers that are the target, letter for letter."""
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / max(len(targets), 1)


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese, Japanese or Korean character is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+", text.lower())


def token_f1(predictions: list[str], targets: list[str]) -> float:
    """Mean over rows of the F1 of words in common (SQuAD, Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250)."""
    total = 0.0
    for prediction, target in zip(predictions, targets, strict=True):
        left, right = Counter(words(prediction)), Counter(words(target))
        common = sum((left & right).values())
        total += 2 * common / (left.total() + right.total()) if common else 0.0
    return total / max(len(targets), 1)
