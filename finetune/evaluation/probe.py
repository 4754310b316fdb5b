"""A linear probe on the features of frozen encoders: the baseline."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from finetune.common.progress import console
from finetune.data.sample import Medium, Sample

PROBED_LABELS = 200  # with more different answers than this, they aren't labels


def probe(training: Sequence[Sample], test: Sequence[Sample], features: Callable[[Medium], Tensor]) -> list[str] | None:
    """Labels of the test rows by logistic regression on mean-pooled features of the training rows.

    Regularisation is chosen by cross-validation on the training rows. None where answers aren't a set of labels, or
    rows don't have media of the same kinds in the same order.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [sample.answer for sample in training]
    if (
        not 2 <= len(set(labels)) <= PROBED_LABELS
        or len(labels) < 4 * len(set(labels))
        or len({tuple(medium.kind for medium in sample.media) for sample in [*training, *test]}) != 1
        or not test[0].media
    ):
        return None

    def pooled(samples: Sequence[Sample]) -> np.ndarray:
        means = [[features(m).float().mean((0, 1)).cpu().numpy() for m in sample.media] for sample in samples]
        return np.stack([np.concatenate(row) for row in means])

    console.print(f"linear probe: {len(training):,} rows, {len(set(labels))} labels")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": [0.001, 0.01, 0.1]},
        cv=3,
    )
    with warnings.catch_warnings():
        # A label with fewer rows than folds, or a fit that ends before it converges: enough for a baseline.
        warnings.simplefilter("ignore", UserWarning)
        return list(search.fit(pooled(training), labels).predict(pooled(test)))
