"""A linear probe on the features of frozen encoders: the baseline."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from finetune.common.progress import console
from finetune.data.rows import Entry
from finetune.data.sample import Medium

PROBED_LABELS = 200  # with more different answers than this, they aren't labels


def probe(rows: Sequence[Entry], test: Sequence[Entry], look: Callable[[Medium], Tensor]) -> list[str] | None:
    """What logistic regression on mean-pooled features, learnt from `rows`, makes of the test rows: the mark to reach.

    Regularisation is chosen by cross-validation on the training rows. None where answers aren't a set of labels, or
    rows don't have media of the same kinds in the same order.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [entry.sample.answer for entry in rows]
    if (
        not 2 <= len(set(labels)) <= PROBED_LABELS
        or len(labels) < 4 * len(set(labels))
        or len({tuple(medium.kind for medium in entry.sample.media) for entry in [*rows, *test]}) != 1
        or not test[0].sample.media
    ):
        return None

    def pooled(entries: Sequence[Entry]) -> np.ndarray:
        means = [[look(m).float().mean((0, 1)).cpu().numpy() for m in entry.sample.media] for entry in entries]
        return np.stack([np.concatenate(row) for row in means])

    console.print(f"linear probe: {len(rows):,} rows, {len(set(labels))} labels")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": [0.001, 0.01, 0.1]},
        cv=3,
    )
    return list(search.fit(pooled(rows), labels).predict(pooled(test)))
