"""The trainer's main path: fit a run on a task's labels, and distil the next run from the teacher store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.sample import Payload
from kcm.task import Task, with_method
from training.calibrate import fixed
from training.data import Split
from training.distil import gauged, round_examples
from training.evaluate import auroc, wilson
from training.fit import Fitted, fit, one_hot
from training.gate import forgetting
from training.judge import fit_judge, max_softmax
from training.run import Run, run_info
from training.small import Examples, Small

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


def labelled_examples(task: Task, kind: Small, train: Split) -> Examples:
    """The task's own labels as examples."""
    ones = np.ones(len(train), np.float32)
    return Examples(kind.featurise(train.payloads), one_hot(train.y, len(task.labels)), ones, ones > 0, ones < 0)


def train_run(task: Task, kind: Small, train: Split, test: Split | None, *, seed: int, progress: Progress) -> Run:
    """Round 0: small model and judge on the edge's labels."""
    examples = labelled_examples(task, kind, train)
    fitted = fit(task, kind, examples, seed=seed, progress=progress)
    info = run_info(task, round_=0, parent="", teacher_id="", seed=seed, temperature=fitted.temperature)
    return _run(info, fitted, kind, train.payloads, examples, test)


def distil_run(
    previous: Run,
    kind: Small,
    train: Split,
    test: Split | None,
    payloads: Sequence[Payload],
    logits: Float32,
    *,
    parent: str,
    teacher_id: str,
    gauge: tuple[Float32, NDArray[np.int64]] | None,
    seed: int,
    progress: Progress,
    p_escalate: Float32 | None = None,
    method: str = "",
) -> Run:
    """The next round: labels, the large model's logits [M, C] for `payloads`, and the judge's confidence.

    Args:
        parent: id of the bundle whose devices sent the samples.
        gauge: the large model's logits [K, C] for labelled samples and their labels [K], to calibrate an "auto" ε_l by.
        p_escalate: [M], with which probability each of `payloads` was sent.
        method: distil by this one (kcm.task.METHODS) instead of the previous run's.

    The new run's metrics hold "forgetting": how its accuracy on the labels of round 0 compares with the previous run's.

    Raises:
        ConfigError: no such method.
    """
    task = with_method(previous.task, method) if method else previous.task
    spec = task.distill
    labelled = labelled_examples(task, kind, train)
    progress(f"{len(payloads)} teacher rows, {len(train)} labels")
    # The labelled rows come first in every run, so these are their out-of-fold predictions.
    own = previous.out_of_fold.take(np.arange(len(train)))
    if gauge is not None:
        spec = gauged(spec, *gauge, float((own.logits.argmax(1) == train.y).mean()))
    judge = previous.judge
    if judge.spec.kind != task.judge.kind:
        judge = fit_judge(task.judge, previous.out_of_fold, previous.targets, previous.info.seed)
    drawn = (seed, previous.info.round + 1)
    features = kind.featurise(payloads)
    examples, passed, used = round_examples(kind, labelled, own, judge, features, logits, spec, p_escalate=p_escalate, seed=drawn)
    progress(f"{passed:.1%} of them above ε_l = {0.0 if spec.teacher_epsilon == 'auto' else spec.teacher_epsilon:.3f}")
    fitted = fit(task, kind, examples, seed=seed, progress=progress)
    info = run_info(task, round_=previous.info.round + 1, parent=parent, teacher_id=teacher_id, seed=seed, temperature=fitted.temperature)
    tested = kind.featurise(test.payloads) if test is not None else None
    run = _run(info, fitted, kind, [*train.payloads, *(payloads[i] for i in used)], examples, test, tested)
    run.metrics["forgetting"] = _forgotten(previous, run, kind, train, test, tested)
    run.metrics["method"] = spec.method
    run.metrics["teacher_rows"] = len(payloads)
    run.metrics["teacher_rows_used"] = passed
    run.metrics["teacher_epsilon"] = 0.0 if spec.teacher_epsilon == "auto" else spec.teacher_epsilon
    return run


def _forgotten(previous: Run, new: Run, kind: Small, train: Split, test: Split | None, tested: Any) -> dict[str, Any]:
    """Out of fold on the labels of round 0, which come first in every run, and under "test" on the test split where there is one."""
    before, after = (run.out_of_fold.logits[: len(train)].argmax(1) == train.y for run in (previous, new))
    found = forgetting(before, after, train.y, new.task.labels)
    if test is not None:
        before, after = (kind.predict(run.small, tested).logits.argmax(1) == test.y for run in (previous, new))
        found["test"] = forgetting(before, after, test.y, new.task.labels)
    return found


def _run(
    info: Any, fitted: Fitted, kind: Small, payloads: Sequence[Payload], examples: Examples, test: Split | None, tested: Any = None
) -> Run:
    confidence = fitted.judge.confidence(fitted.out_of_fold)
    return Run(
        info=info,
        small=fitted.small,
        judge=fitted.judge,
        out_of_fold=fitted.out_of_fold,
        payloads=payloads,
        targets=examples.targets,
        weights=examples.weights,
        labelled=examples.labelled,
        threshold=fixed(confidence, info.task.judge.epsilon),
        metrics=measure(info.task, fitted, kind, examples, test, tested),
    )


def measure(task: Task, fitted: Fitted, kind: Small, examples: Examples, test: Split | None, tested: Any = None) -> dict[str, Any]:
    """Out-of-fold on the labelled examples, and on the test split where there is one: accuracy, and how well confidence ranks it.

    `tested` are the features of the test split, where they are made already.
    """
    own = fitted.out_of_fold.take(np.flatnonzero(examples.labelled))
    splits = {"out_of_fold": (own, examples.targets[examples.labelled].argmax(1))}
    if test is not None:
        splits["test"] = (kind.predict(fitted.small, kind.featurise(test.payloads) if tested is None else tested), test.y)
    metrics: dict[str, Any] = {}
    for name, (predictions, labels) in splits.items():
        right = predictions.logits.argmax(1) == labels
        metrics[name] = {
            "samples": len(labels),
            "accuracy": float(right.mean()),
            "accuracy_interval": wilson(int(right.sum()), len(right)),
            f"auroc_{fitted.judge.spec.kind}": _auroc(fitted.judge.confidence(predictions), right),
            f"auroc_{fitted.twin.spec.kind}": _auroc(fitted.twin.confidence(predictions), right),
            "auroc_max_softmax": _auroc(max_softmax(predictions.logits, fitted.temperature), right),
        }
    return metrics


def _auroc(confidence: Float32, right: NDArray[np.bool_]) -> float | None:
    """None where every answer is right or every one wrong: JSON has no NaN."""
    return auroc(confidence, right) if 0 < right.sum() < right.size else None
