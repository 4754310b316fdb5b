"""Short answers to questions on pictures, as VQA scores them (Antol et al. 2015, https://arxiv.org/abs/1505.00468). Its
official script reads only its own files, and no package has it.
"""

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
    """As in the official script: lower case, without articles and most punctuation, number words as digits. Apostrophes
    are removed, where the script adds missing ones ("dont" is "don't"), and so is Chinese punctuation. An answer of
    articles only, such as "A", stays.
    """
    plain = CHINESE_PUNCTUATION.sub("", answer.replace("\n", " ").replace("\t", " ").strip())
    text, joined = plain, COMMA_IN_NUMBER.search(plain)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in plain or f" {mark}" in plain
        text = text.replace(mark, "" if beside_space or joined else " ")
    tokens = [NUMBERS.get(word, word).replace("'", "") for word in PERIOD.sub("", text).lower().split()]
    return " ".join([token for token in tokens if token not in ARTICLES] or tokens)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement of a prediction with people's answers, both `normalised`, 0 to 1: min(n / 3, 1), n answers being equal
    to it, averaged over leaving out each of the answers (officially ten). Of fewer than four, the share that is equal.
    """
    equal = sum(answer == prediction for answer in answers)
    others = len(answers) - equal
    if len(answers) < 4:
        return equal / len(answers)
    return (equal * min((equal - 1) / 3, 1.0) + others * min(equal / 3, 1.0)) / len(answers)


def commonest(answers: Sequence[str]) -> str:
    """The most frequent answer, compared when normalised, as first written; the earliest of several."""
    counts = Counter(normalised(answer) for answer in answers)
    best = max(counts.values())
    return next(answer for answer in answers if counts[normalised(answer)] == best)
