"""Captions against references: sacrebleu's BLEU and chrF, and CIDEr-D, from counts of each row that add up:
pycocoevalcap and sacrebleu itself would count every n-gram anew in each of 1,000 resamples.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import TYPE_CHECKING

from finetune.data.metrics import Measures, Rows
from finetune.data.metrics.text import CJK_CHARACTER, words

if TYPE_CHECKING:
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

ORDER = 4  # words of the longest n-gram
SIGMA = 6.0  # words: width of CIDEr-D's penalty on a difference in length

_numbers = count()


def caption_counts(prediction: str, references: Sequence[str]) -> Measures:
    """The measures of one row for `caption_scores`. BLEU splits Chinese, if references are mostly that."""
    right = [word for reference in references for word in words(reference)]
    chinese = 2 * sum(map(bool, map(CJK_CHARACTER.fullmatch, right))) > len(right)
    bleu = _bleu("zh" if chinese else "13a").sentence_score(prediction, references)
    # Private, as sacrebleu's public API returns chrF's score of a row but not its counts.
    chrf = _chrf()._extract_corpus_statistics([prediction], [[reference] for reference in references])
    return {
        "bleu": [bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals],
        "chrf": chrf[0],
        "cider": _cider_terms(words(prediction), [words(reference) for reference in references]),
    }


def caption_scores(rows: Rows) -> dict[str, float]:
    """bleu and chrf of all rows together, 0 to 1 (a hundredth of sacrebleu's scores; BLEU of short captions ignores
    n-grams longer than they are). cider: the mean of CIDEr-D, 0 to 1 (a tenth of the paper's), with the document
    frequencies of these rows' references.
    """
    import numpy as np

    bleu, chrf = (np.array([row[name] for row in rows]).sum(0).tolist() for name in ("bleu", "chrf"))
    return {
        "bleu": _bleu_score(bleu) / 100,
        "chrf": _chrf()._compute_score_from_stats(chrf).score / 100,
        "cider": _cider([row["cider"] for row in rows]),
    }


def _bleu_score(counts: list[int]) -> float:
    """BLEU, 0 to 100, of the words of answers and of references, then matches and totals of each order."""
    from sacrebleu.metrics.bleu import BLEU

    predicted, right, matches, totals = counts[0], counts[1], counts[2 : 2 + ORDER], counts[2 + ORDER :]
    return BLEU.compute_bleu(matches, totals, predicted, right, smooth_method="exp", effective_order=True).score


@cache
def _bleu(tokenizer: str) -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)


@cache
def _chrf() -> "CHRF":
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _number_of(gram: tuple[str, ...]) -> int:
    """A unique number, from 0, for each n-gram."""
    return next(_numbers)


def _grams(tokens: Sequence[str]) -> list[tuple[int, int, int]]:
    """(n - 1, number, occurrences) of each n-gram."""
    grams = [(n, tuple(tokens[i : i + n + 1])) for n in range(ORDER) for i in range(len(tokens) - n)]
    return [(n, _number_of(gram), times) for (n, gram), times in Counter(grams).items()]


def _cider_terms(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Measures:
    """Terms of CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726), to be weighted by n-gram.

    Tables of (place, n-gram, value). A place is an order of the answer ("predicted"), or of one of R references: R *
    ORDER of them ("right": squared counts; "both": products with the answer's). "grams": those of the references.
    "highest": the highest number of an n-gram. "penalty": for each place of the references.
    """
    import numpy as np

    answer, refs = _grams(predicted), [_grams(reference) for reference in references]
    times = {number: count for _, number, count in answer}
    right = [(ORDER * r + n, number, count) for r, grams in enumerate(refs) for n, number, count in grams]
    both = [(place, number, min(times[number], count) * count) for place, number, count in right if number in times]
    lengths = np.array([max(len(reference) - 1, 0) for reference in references], dtype=np.float64)
    penalty = np.exp(-((max(len(predicted) - 1, 0) - lengths) ** 2) / (2 * SIGMA**2))

    def table(terms: list[tuple[int, int, int]]) -> "np.ndarray":
        return np.array(terms, dtype=np.int64).reshape(-1, 3)

    return {
        "predicted": table([(n, number, count * count) for n, number, count in answer]),
        "right": table([(place, number, count * count) for place, number, count in right]),
        "both": table(both),
        "grams": np.unique(np.array([number for _, number, _ in right], dtype=np.int64)),
        "highest": max([number for _, number, _ in (*answer, *right)], default=0),
        "penalty": np.repeat(penalty, ORDER),
    }


def _cider(rows: Rows) -> float:
    """Mean CIDEr-D / 10 of rows of `_cider_terms`."""
    import numpy as np

    grams = np.concatenate([row["grams"] for row in rows])
    documents = np.bincount(grams, minlength=max(row["highest"] for row in rows) + 1)
    idf = np.log(len(rows)) - np.log(np.maximum(documents, 1))
    places = np.array([len(row["penalty"]) for row in rows])

    def summed(key: str, sizes: "np.ndarray") -> "np.ndarray":
        """Sums of values times squared weights by place, the places of all rows one after the other."""
        tables = [row[key] for row in rows]
        starts = np.repeat(np.cumsum(sizes) - sizes, [len(table) for table in tables])
        place, number, value = np.concatenate(tables).T
        return np.bincount(starts + place, weights=value * idf[number] ** 2, minlength=int(sizes.sum()))

    row_of = np.repeat(np.arange(len(rows)), places)
    order = np.arange(len(row_of)) % ORDER
    predicted = summed("predicted", np.full(len(rows), ORDER))[ORDER * row_of + order]
    norm = np.sqrt(predicted * summed("right", places))
    cosine = np.divide(summed("both", places), norm, out=np.zeros_like(norm), where=norm > 0)
    similarity = cosine * np.concatenate([row["penalty"] for row in rows])
    return float(np.mean(np.bincount(row_of, weights=similarity) / places))
