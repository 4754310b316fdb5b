"""Written answers against references, in any language. rouge-score and SQuAD's script split words by spaces, so that a
Chinese sentence is one word.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
CJK_CHARACTER = re.compile(f"[{CJK}]")
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
FREE_TEXT = ("exact_match", "token_f1", "rouge_l")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each Chinese, Japanese or Korean character is a word."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def free_text(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Measures of a free-text answer against its nearest reference, 0 to 1: exact_match (letter for letter), token_f1,
    rouge_l; "good" is token_f1.
    """
    predicted, right = words(prediction), [words(reference) for reference in references]
    f1 = max(token_f1(predicted, reference) for reference in right)
    return {
        "good": f1,
        "exact_match": float(prediction in references),
        "token_f1": f1,
        "rouge_l": max(rouge_l(predicted, reference) for reference in right),
    }


def token_f1(predicted: Sequence[str], right: Sequence[str]) -> float:
    """F1 of words in common (SQuAD, Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250)."""
    if not predicted and not right:
        return 1.0
    left, other = Counter(predicted), Counter(right)
    return 2 * (left & other).total() / (left.total() + other.total())


def rouge_l(predicted: Sequence[str], right: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013)."""
    from rapidfuzz.distance import LCSseq

    if not predicted and not right:
        return 1.0
    return 2 * LCSseq.similarity(predicted, right) / (len(predicted) + len(right))


def edits(predicted: str, right: str) -> dict[str, int]:
    """Word and character edits between an answer and the right one ("word_edits", "character_edits"), and the number of
    words, of characters, and of words that are one Chinese, Japanese or Korean character ("cjk") in the latter. Case,
    punctuation and spaces don't count.
    """
    from rapidfuzz.distance import Levenshtein

    ours, theirs = words(predicted), words(right)
    return {
        "words": len(theirs),
        "cjk": sum(map(bool, map(CJK_CHARACTER.fullmatch, theirs))),
        "characters": sum(map(len, theirs)),
        "word_edits": Levenshtein.distance(theirs, ours),
        "character_edits": Levenshtein.distance("".join(theirs), "".join(ours)),
    }
