"""The gate at a round's end: is the candidate no worse than the run that it would replace? And what a round forgot."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate
from training.data import Split
from training.evaluate import paired_interval
from training.run import Run
from training.small import Small

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


def compare(before: Bool, after: Bool) -> dict[str, Any]:
    """Accuracy before and after on the same N samples, given which were answered rightly; the difference with its 95 % interval."""
    difference, low, high = paired_interval(after.astype(float) - before)
    return {
        "samples": len(before),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": difference,
        "interval": (low, high),
    }


def forgetting(before: Bool, after: Bool, labels: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, Any]:
    """`compare` on round-0 data, and by how much each class fell whose accuracy did, worst first."""
    falls = {}
    for label in np.unique(labels):
        of_class = labels == label
        falls[names[label]] = float(after[of_class].mean() - before[of_class].mean())
    worst = sorted((fall, name) for name, fall in falls.items() if fall < 0)
    return {**compare(before, after), "classes": {name: fall for fall, name in worst}}


def gate(previous: Run, new: Run, kind: Small, gold: Split | None, large: Float32 | None = None) -> dict[str, Any]:
    """The verdict on a candidate, with its figures: {"passed", "weak", "tolerance", "failed": names, "figures": {name: compare}}.

    A figure passes where the lower bound of its paired difference is at least −gate_tolerance: the candidate has to be shown to be
    no worse, so too few samples fail as well. Figures:
        "gold": the small models on the gold set.
        "same calls": both systems on it at the share of cloud calls that the previous run is set to; ε is read off the gold set.
        "round 0": out-of-fold predictions for the labels of round 0, which both runs learnt from: alone where there is no gold set
            (`weak`), and there, as beside a gold set, it fails only where the mean falls by more than the tolerance and the whole
            interval lies below zero: with few labels one sample is more than the tolerance.

    Args:
        large: the large model's logits [N, C] for the gold set, without a hint.
    """
    tolerance = new.task.distill.gate_tolerance
    figures: dict[str, Any] = {}
    if gold is not None:
        features = kind.featurise(gold.payloads)
        predictions = [kind.predict(run.small, features) for run in (previous, new)]
        right = [p.logits.argmax(1) == gold.y for p in predictions]
        figures["gold"] = compare(*right)
        if large is not None:
            rate = _rate(previous)
            large_right = large.argmax(1) == gold.y
            systems = []
            for run, p, small_right in zip((previous, new), predictions, right, strict=True):
                score = run.score(p)
                systems.append(np.where(score > epsilon_for_rate(score, rate), small_right, large_right))
            figures["same calls"] = {**compare(*systems), "cloud_rate": rate}
    figures["round 0"] = {name: value for name, value in new.metrics["forgetting"].items() if name not in ("classes", "test")}
    failed = [name for name, f in figures.items() if name != "round 0" and f["interval"][0] < -tolerance]
    forgotten = figures["round 0"]
    if forgotten["difference"] < -tolerance and forgotten["interval"][1] < 0:
        failed.append("round 0")
    return {"passed": not failed, "weak": gold is None, "tolerance": tolerance, "failed": failed, "figures": figures}


def _rate(run: Run) -> float:
    """The share of cloud calls that a run's ε was chosen for, else the one that it made when it was chosen."""
    threshold = run.threshold
    wanted = threshold.target if threshold.method == "cloud-rate" else threshold.cloud_rate
    return 0.0 if wanted is None else wanted
