"""Captions against references: BLEU and chrF as sacrebleu counts them, and CIDEr-D, from counts of each row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any

from finetune.data.metrics.text import CJK_CHARACTER, words

Rows = Sequence[Mapping[str, Any]]

ORDER = 4  # words of the longest n-gram
SIGMA = 6.0  # of CIDEr-D's penalty on a difference in length, in words

_numbers = count()


def caption_counts(prediction: str, references: Sequence[str]) -> dict[str, Any]:
    """What `caption_scores` sums up of one row. BLEU splits Chinese into characters where most of the references is."""
    right = [word for reference in references for word in words(reference)]
    chinese = 2 * sum(map(bool, map(CJK_CHARACTER.fullmatch, right))) > len(right)
    streams = [[reference] for reference in references]
    bleu, chrf = _bleu("zh" if chinese else "13a"), _chrf()
    return {
        "bleu": bleu._extract_corpus_statistics([prediction], streams)[0],
        "chrf": chrf._extract_corpus_statistics([prediction], streams)[0],
        "cider": _cider_terms(words(prediction), [words(reference) for reference in references]),
    }


def caption_scores(rows: Rows) -> dict[str, float]:
    """bleu and chrf of all rows together, 0 to 1 (sacrebleu's hundredth; BLEU of short captions counts the n-grams that
    there can be). cider: the mean of CIDEr-D, whose 10 is 1 here; word frequencies are those of these rows' references.
    """
    import numpy as np

    bleu, chrf = (np.array([row[name] for row in rows]).sum(0).tolist() for name in ("bleu", "chrf"))
    return {
        "bleu": _bleu("13a")._compute_score_from_stats(bleu).score / 100,
        "chrf": _chrf()._compute_score_from_stats(chrf).score / 100,
        "cider": _cider([row["cider"] for row in rows]),
    }


@cache
def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _number_of(gram: tuple[str, ...]) -> int:
    """A number of its own for each n-gram there is, from 0."""
    return next(_numbers)


def _grams(tokens: Sequence[str]) -> list[tuple[int, int, int]]:
    """(n - 1, number, times it occurs) of each n-gram."""
    grams = [(n, tuple(tokens[i : i + n + 1])) for n in range(ORDER) for i in range(len(tokens) - n)]
    return [(n, _number_of(gram), times) for (n, gram), times in Counter(grams).items()]


def _cider_terms(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Terms of CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726) that await a weight for each n-gram.

    Tables of (place, n-gram, value): a place is an order of an answer ("said"), or of one of R references, R * ORDER of
    them, for their squared lengths ("right") and products ("both"). "seen": the references' n-grams. "highest": of the
    numbers of n-grams. "penalty": of each reference's place.
    """
    import numpy as np

    answer, refs = _grams(said), [_grams(reference) for reference in references]
    times = {number: count for _, number, count in answer}
    right = [(ORDER * r + n, number, count) for r, grams in enumerate(refs) for n, number, count in grams]
    both = [(place, number, min(times[number], count) * count) for place, number, count in right if number in times]
    lengths = np.array([max(len(reference) - 1, 0) for reference in references], dtype=np.float64)
    penalty = np.exp(-((max(len(said) - 1, 0) - lengths) ** 2) / (2 * SIGMA**2))

    def table(terms: list[tuple[int, int, int]]) -> Any:
        return np.array(terms, dtype=np.int64).reshape(-1, 3)

    return {
        "said": table([(n, number, count * count) for n, number, count in answer]),
        "right": table([(place, number, count * count) for place, number, count in right]),
        "both": table(both),
        "seen": np.unique(np.array([number for _, number, _ in right], dtype=np.int64)),
        "highest": max([number for _, number, _ in (*answer, *right)], default=0),
        "penalty": np.repeat(penalty, ORDER),
    }


def _cider(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean CIDEr-D / 10 of rows of `_cider_terms`."""
    import numpy as np

    seen = np.concatenate([row["seen"] for row in rows])
    found = np.bincount(seen, minlength=max(row["highest"] for row in rows) + 1)
    idf = np.log(len(rows)) - np.log(np.maximum(found, 1))
    places = np.array([len(row["penalty"]) for row in rows])

    def summed(key: str, sizes: Any) -> Any:
        """Values times squared weights, summed up by place; places of row i begin where those of row i - 1 end."""
        tables = [row[key] for row in rows]
        starts = np.repeat(np.cumsum(sizes) - sizes, [len(table) for table in tables])
        place, number, value = np.concatenate(tables).T
        return np.bincount(starts + place, weights=value * idf[number] ** 2, minlength=int(sizes.sum()))

    row_of = np.repeat(np.arange(len(rows)), places)
    order = np.arange(len(row_of)) % ORDER
    said = summed("said", np.full(len(rows), ORDER))[ORDER * row_of + order]
    norm = np.sqrt(said * summed("right", places))
    cosine = np.divide(summed("both", places), norm, out=np.zeros_like(norm), where=norm > 0)
    similar = cosine * np.concatenate([row["penalty"] for row in rows])
    return float(np.mean(np.bincount(row_of, weights=similar) / places))
