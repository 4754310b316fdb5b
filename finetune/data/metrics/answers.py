"""Answers to questions on pictures, as VQA scores them (Antol et al. 2015, https://arxiv.org/abs/1505.00468)."""

import re
from collections import Counter
from collections.abc import Sequence

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS)}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CHINESE_PUNCTUATION = re.compile("[，。！？；：、“”‘’（）《》【】「」…．]")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")


def normalised(answer: str) -> str:
    """As the official script: lower case, without articles and most punctuation, number words as digits. Apostrophes
    go on both sides, where the script puts those that are missing in ("dont" is "don't"); so does Chinese punctuation.
    Articles stay where there is nothing else: "A" is an answer.
    """
    given = CHINESE_PUNCTUATION.sub("", answer.replace("\n", " ").replace("\t", " ").strip())
    text, joined = given, COMMA_IN_NUMBER.search(given)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_space or joined else " ")
    tokens = [NUMBERS.get(word, word).replace("'", "") for word in PERIOD.sub("", text).lower().split()]
    return " ".join([token for token in tokens if token not in ARTICLES] or tokens)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How many of the people asked answered alike, both `normalised`: min(n / 3, 1), averaged over leaving each of the
    answers out, where there are four or more (ten officially); of up to three, the share that did.
    """
    alike = sum(answer == prediction for answer in answers)
    others = len(answers) - alike
    if len(answers) < 4:
        return alike / len(answers)
    return (alike * min((alike - 1) / 3, 1.0) + others * min(alike / 3, 1.0)) / len(answers)


def commonest(answers: Sequence[str]) -> str:
    """The one given most often, alike when normalised, as it was first written; the earliest where several are."""
    counts = Counter(normalised(answer) for answer in answers)
    best = max(counts.values())
    return next(answer for answer in answers if counts[normalised(answer)] == best)
