"""One round of fitting: small model, its out-of-fold predictions, the judge on them, and what calibration needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.task import Task
from training.judge import Judge, Predictions, fit_judge, fit_temperature, harden
from training.small import Examples, Small, seeded, subset

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Fitted:
    """A small model with its judges. `out_of_fold` are predictions for the examples by models that hadn't seen them."""

    small: Any
    judge: Judge
    twin: Judge  # the judge of the other kind with as many parameters: MLP beside KAN, always reported
    temperature: float  # of the small model's logits, for the max-softmax baseline
    out_of_fold: Predictions


def fit(task: Task, kind: Small, examples: Examples, *, seed: int = 0, progress: Progress = lambda _: None) -> Fitted:
    """Cross-fit, then fit on all. `seed` draws the folds, the judge's start, and what the kind of small model draws.

    Raises:
        DataError: fewer examples than folds.
    """
    kind = seeded(kind, seed)
    progress(f"small model on {len(examples)} examples, {task.judge.folds} folds")
    predictions = cross_fit(task, kind, examples, seed=seed)
    small = kind.fit(examples)
    progress("judge on out-of-fold predictions")
    judge = fit_judge(task.judge, predictions, examples.targets, seed)
    other = msgspec.structs.replace(task.judge, kind="mlp" if task.judge.kind == "kan" else "kan")
    twin = fit_judge(other, predictions, examples.targets, seed)
    return Fitted(small, judge, twin, fit_temperature(predictions.logits, harden(examples.targets)), predictions)


def cross_fit(task: Task, kind: Small, examples: Examples, *, seed: int = 0) -> Predictions:
    """Out-of-fold predictions [N]: each example by a model fitted on the other folds, stratified by the target's class.

    Of a retrieval task, whose queries at run time are of items that no label showed, an item's queries lie in one fold.
    """
    classes = examples.targets.argmax(1)
    by_item = getattr(kind, "by_item", False)
    folds = item_folds(classes, task.judge.folds, seed) if by_item else fold_of(classes, task.judge.folds, seed)
    held: list[NDArray[np.int64]] = []
    parts: list[Predictions] = []
    for fold in range(task.judge.folds):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        model = kind.fit(subset(kind, examples, inside))
        held.append(outside)
        parts.append(kind.predict(model, kind.take(examples.features, outside)))
    return Predictions.concatenate(parts).take(np.argsort(np.concatenate(held), kind="stable"))


def fold_of(classes: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each example [N], every class spread evenly over the folds.

    Raises:
        DataError: fewer examples than folds.
    """
    if len(classes) < folds:
        raise DataError(f"{len(classes)} examples can't be split into {folds} folds", fix="add rows, or lower folds under [judge]")
    order = np.lexsort((np.random.default_rng(seed).random(len(classes)), classes))
    fold = np.empty(len(classes), np.int64)
    fold[order] = np.arange(len(classes)) % folds
    return fold


def item_folds(items: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each query [N] of an item [N]: all queries of one item share theirs.

    Raises:
        DataError: fewer items than folds.
    """
    known, place = np.unique(items, return_inverse=True)
    if len(known) < folds:
        raise DataError(f"queries of {len(known)} items can't be split into {folds} folds", fix="add rows, or lower folds under [judge]")
    drawn: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(known)) % folds
    return drawn[place]


def one_hot(labels: NDArray[np.int64], classes: int) -> Float32:
    """[N] ids → [N, C]."""
    targets = np.zeros((len(labels), classes), np.float32)
    targets[np.arange(len(labels)), labels] = 1
    return targets


def softmax(logits: Float32, temperature: float = 1.0) -> Float32:
    """[N, C] → [N, C], rows sum to one."""
    z = (logits - logits.max(1, keepdims=True)) / temperature
    e = np.exp(z)
    p: Float32 = (e / e.sum(1, keepdims=True)).astype(np.float32)
    return p
