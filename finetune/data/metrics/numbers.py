"""Numbers against the right ones. scikit-learn has no missing predictions; scipy's correlations are undefined for
constant ones, and compute p-values in each of 1,000 resamples.
"""

import math
import re
import unicodedata
from typing import Any

from finetune.data.metrics import Rows

NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


def number_in(text: str) -> float | None:
    """The number in a text that has exactly one: '4.5', '4.5 stars', '评分：4。', '1,250', '−3'. Else None."""
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    numbers = NUMBER.findall(plain)
    number = float(numbers[0].replace(",", "")) if len(numbers) == 1 else math.nan
    return number if math.isfinite(number) else None


def number_scores(rows: Rows, low: float | None, high: float | None) -> dict[str, float]:
    """Scores of rows with "predicted" (None without a number) and "right": mean_absolute_error,
    root_mean_squared_error, spearman, pearson, readable (share of rows with a number).

    An answer without a number has the largest possible error between `low` and `high`, by default the lowest and
    highest right number of these rows; for correlations it is the mean of the others. Correlations are 0 if all answers
    are equal, and left out if all right numbers are.
    """
    import numpy as np
    from scipy.stats import rankdata

    right = np.array([row["right"] for row in rows], dtype=np.float64)
    predicted = np.array([row["predicted"] for row in rows], dtype=np.float64)  # None is NaN
    readable = ~np.isnan(predicted)
    bottom, top = right.min() if low is None else low, right.max() if high is None else high
    errors = np.where(readable, np.abs(predicted - right), np.maximum(right - bottom, top - right))
    scores = {
        "mean_absolute_error": float(errors.mean()),
        "root_mean_squared_error": float(np.sqrt(np.mean(errors**2))),
        "readable": float(readable.mean()),
    }
    if np.ptp(right) == 0:
        return scores
    filled = np.where(readable, predicted, predicted[readable].mean() if readable.any() else 0.0)
    correlations = {"spearman": correlation(rankdata(filled), rankdata(right)), "pearson": correlation(filled, right)}
    return scores | correlations


def correlation(left: Any, right: Any) -> float:
    """Pearson's, of two (N,) arrays, -1 to 1; 0 if one of them is constant."""
    import numpy as np

    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    # Scaled to the largest deviation first, so that no square over- or underflows.
    left, right = ((values - values.mean()) / np.abs(values - values.mean()).max() for values in (left, right))
    return float(np.clip(left @ right / np.sqrt((left @ left) * (right @ right)), -1.0, 1.0))
