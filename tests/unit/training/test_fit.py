"""Cross-fitting: no example is ever predicted by a model that saw it, and classes are spread evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcm.errors import DataError
from kcm.task import JudgeSpec, Task
from training.fit import cross_fit, fit, fold_of, one_hot, softmax
from training.judge import Predictions
from training.small import Examples, subset


class Memory:
    """A small model that knows the examples it saw by heart, and tells in its first logit whether it saw this one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def featurise(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([float(text) for text in texts], np.float32)

    def take(self, features: np.ndarray, index: np.ndarray) -> np.ndarray:
        return features[index]

    def join(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.concatenate([first, second])

    def fit(self, examples: Examples) -> dict[float, int]:
        self.sizes.append(len(examples))
        return {float(x): int(t.argmax()) for x, t in zip(examples.features, examples.targets, strict=True)}

    def predict(self, model: dict[float, int], features: np.ndarray) -> Predictions:
        logits = np.zeros((len(features), 3), np.float32)
        for row, x in enumerate(features.tolist()):
            logits[row] = (x in model, x, 3.0)
        return Predictions(logits, np.ones(len(features), np.float32), np.zeros(len(features), np.float32))


def examples(rows: int, classes: int = 3) -> Examples:
    ones = np.ones(rows, np.float32)
    return Examples(np.arange(rows, dtype=np.float32), one_hot(np.arange(rows) % classes, classes), ones, ones > 0, ones < 0)


def task(folds: int) -> Task:
    return Task(id="t", labels=("a", "b", "c"), judge=JudgeSpec(folds=folds))


@given(st.integers(2, 7), st.integers(7, 40), st.integers(0, 9))
def test_no_example_is_predicted_by_a_model_that_saw_it(folds: int, rows: int, seed: int) -> None:
    kind = Memory()
    got = cross_fit(task(folds), kind, examples(rows), seed=seed)
    assert not got.logits[:, 0].any(), "a judge that reads this learns over-confidence"
    assert got.logits[:, 1].tolist() == list(range(rows)), "predictions must come back in the examples' order"
    assert len(kind.sizes) == folds
    assert min(kind.sizes) >= rows - -(-rows // folds)


def test_the_last_model_sees_all() -> None:
    kind = Memory()
    fitted = fit(task(3), kind, examples(12))
    assert kind.sizes == [8, 8, 8, 12]
    assert len(fitted.small) == 12
    assert (fitted.judge.spec.kind, fitted.twin.spec.kind) == ("kan", "mlp")


@given(st.lists(st.integers(0, 5), min_size=5, max_size=80), st.integers(2, 5), st.integers(0, 99))
def test_every_class_is_spread_evenly(classes: list[int], folds: int, seed: int) -> None:
    labels = np.array(classes)
    fold = fold_of(labels, folds, seed)
    for label in set(classes):
        counts = np.bincount(fold[labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1
    sizes = np.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(fold, fold_of(labels, folds, seed))


def test_the_seed_draws_the_folds() -> None:
    labels = np.zeros(40, np.int64)
    assert not np.array_equal(fold_of(labels, 5, 0), fold_of(labels, 5, 1))


def test_too_few_examples_are_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match="4 examples can't be split into 5 folds") as error:
        cross_fit(task(5), Memory(), examples(4))
    assert "lower folds" in error.value.fix


def test_a_subset_takes_every_column_along() -> None:
    whole = examples(6)
    whole.weights[:] = np.arange(6)
    whole.labelled[4], whole.reverse[5] = False, True
    part = subset(Memory(), whole, np.array([5, 4, 0]))
    columns: list[Any] = [part.features, part.weights, part.labelled, part.reverse, part.targets.argmax(1)]
    assert [c.tolist() for c in columns] == [[5, 4, 0], [5, 4, 0], [True, False, True], [True, False, False], [2, 1, 0]]


def test_softmax_is_stable() -> None:
    assert softmax(np.array([[1e4, 1e4 - 1, -1e4]], np.float32)) == pytest.approx(np.array([[0.7310586, 0.2689414, 0]]), abs=1e-6)
