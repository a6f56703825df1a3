"""The floor that stands beside every result: TF-IDF words and word pairs, a linear model, max-softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class TfidfLinear:
    """Fitted on texts and hard labels [N]; a class without a row is never predicted."""

    def __init__(self, texts: Sequence[str], labels: NDArray[np.int64], classes: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._classes = classes
        self._vectorizer: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        self._model: Any = LogisticRegression(C=30.0, max_iter=200, tol=1e-3)
        self._model.fit(self._vectorizer.fit_transform(texts), labels)

    def probabilities(self, texts: Sequence[str]) -> Float32:
        """[N, C]."""
        out = np.zeros((len(texts), self._classes), np.float32)
        out[:, self._model.classes_] = self._model.predict_proba(self._vectorizer.transform(texts))
        return out
