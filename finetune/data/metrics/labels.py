"""One or several labels per row against the right ones. Like scikit-learn's scores, but from counts and ranks: fast
enough for 1,000 resamples, and answers may be no label at all.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from finetune.data.metrics import Measures, Rows

if TYPE_CHECKING:
    import numpy as np

BINS = 15


def fold(label: str) -> str:
    """A label as it is compared: without spaces around it, case, and a full stop at its end."""
    plain = label.strip().casefold()
    return plain.rstrip(".。．").rstrip() or plain


def labelled(predicted: Iterable[str], right: Iterable[str]) -> Measures:
    """The measures of one row: "predicted", "right" and "hits" are labels by `fold`, "names" the right ones as written.
    "good" is the share of common labels among all of both: 1 or 0 for a single label.
    """
    names = {fold(label): label for label in right}
    keys = dict.fromkeys(map(fold, predicted))
    hits = tuple(key for key in keys if key in names)
    every = len(keys.keys() | names.keys())
    return {
        "predicted": tuple(keys),
        "right": tuple(names),
        "hits": hits,
        "names": tuple(names.values()),
        "good": len(hits) / every if every else 1.0,
        "exact_match": float(keys.keys() == names.keys()),
    }


def with_probabilities(row: Measures, probabilities: Mapping[str, float]) -> Measures:
    """The same measures with those of `probability_scores`: "labels", "probabilities" and "truth" in one order."""
    import numpy as np

    right = set(row["right"])
    return {
        **row,
        "labels": tuple(probabilities),
        "probabilities": np.array(list(probabilities.values()), dtype=np.float64),
        "truth": np.array([fold(label) in right for label in probabilities]),
    }


def counted(rows: Rows) -> dict[str, tuple[int, int, int]]:
    """{label that is right in some row: (rows where it is right and predicted, is predicted, is right)}."""
    hits, predicted, right = (
        Counter(chain.from_iterable(row[key] for row in rows)) for key in ("hits", "predicted", "right")
    )
    return {label: (hits[label], predicted[label], right[label]) for label in sorted(right)}


def precision_recall_f1(hits: int, predicted: int, right: int) -> tuple[float, float, float]:
    """Each is 0 if nothing was predicted, or nothing is right."""
    return (
        hits / predicted if predicted else 0.0,
        hits / right if right else 0.0,
        2 * hits / (predicted + right) if hits else 0.0,
    )


def label_scores(rows: Rows) -> dict[str, float]:
    """precision, recall and f1 averaged over the labels that are right in some row (macro), and f1 of all decisions
    about them (f1_micro). An answer that is none of these labels is no label's false positive.
    """
    counts = list(counted(rows).values())
    if not counts:
        return {}
    each = [precision_recall_f1(*count) for count in counts]
    precision, recall, f1 = (sum(values) / len(counts) for values in zip(*each, strict=True))
    hits, predicted, right = (sum(numbers) for numbers in zip(*counts, strict=True))
    f1_micro = precision_recall_f1(hits, predicted, right)[2]
    return {"precision": precision, "recall": recall, "f1": f1, "f1_micro": f1_micro}


def probability_scores(rows: Rows, several: bool) -> dict[str, float]:
    """auroc: of each label against the rest, averaged over labels that some rows have and some don't; left out if there
    are none. calibration_error: ECE in 15 equal bins (Guo et al. 2017, https://arxiv.org/abs/1706.04599), of the
    likeliest label, or of each label's own probability where rows may have `several`.

    {} unless all rows have probabilities of the same labels.
    """
    import numpy as np

    if any(row.get("labels") != rows[0].get("labels") or "labels" not in row for row in rows):
        return {}
    probabilities, truth = (np.stack([row[key] for row in rows]) for key in ("probabilities", "truth"))
    if several:
        confidence, right = probabilities.ravel(), truth.ravel()
    else:
        best = probabilities.argmax(1)[:, None]
        confidence, right = (np.take_along_axis(values, best, 1)[:, 0] for values in (probabilities, truth))
    scores = {"calibration_error": calibration_error(confidence, right)}
    area = auroc(probabilities, truth)
    return scores if area is None else {"auroc": area, **scores}


def calibration_error(confidence: "np.ndarray", right: "np.ndarray") -> float:
    """Expected calibration error of (N,) confidences, 0 to 1, and (N,) booleans. Bins include their upper end."""
    import numpy as np

    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def auroc(scores: "np.ndarray", truth: "np.ndarray") -> float | None:
    """Mean area under the ROC curve over columns of (N, C) scores and truth; None if no column has both classes."""
    import numpy as np

    areas = []
    for column, right in zip(scores.T, truth.T, strict=True):
        positives, negatives = column[right], np.sort(column[~right])
        if len(positives) and len(negatives):  # pairs in the right order, and half of those that tie (Mann-Whitney)
            twice = negatives.searchsorted(positives, "left") + negatives.searchsorted(positives, "right")
            areas.append(twice.sum() / (2 * len(positives) * len(negatives)))
    return float(np.mean(areas)) if areas else None


def label_tables(rows: Rows, labels: Sequence[str], several: bool) -> dict[str, Any]:
    """ "per_label": precision, recall, f1 and support of each label; and, where a row has one, "confusion": rows of
    "counts" are the right labels, columns the predicted ones, in the order of "labels", and a last column all that is
    none of them. `labels`: the known ones; others that are right in some row are added.
    """
    names: dict[str, str] = {fold(label): label for label in labels}
    for row in rows:
        for key, name in zip(row["right"], row["names"], strict=True):
            names.setdefault(key, name)
    names = dict(sorted(names.items(), key=lambda item: item[1]))
    counts = counted(rows)
    predicted = Counter(chain.from_iterable(row["predicted"] for row in rows))
    per_label = {}
    for key, name in names.items():
        precision, recall, f1 = precision_recall_f1(*counts.get(key, (0, predicted[key], 0)))
        support = counts[key][2] if key in counts else 0
        per_label[name] = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    if several:
        return {"per_label": per_label}
    place = {key: number for number, key in enumerate(names)}
    table = [[0] * (len(place) + 1) for _ in place]
    for row in rows:
        table[place[row["right"][0]]][place.get(next(iter(row["predicted"]), ""), len(place))] += 1
    return {"confusion": {"labels": list(names.values()), "counts": table}, "per_label": per_label}
