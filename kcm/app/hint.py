"""The hint's gate for a run: what the large model answers to escalated samples with the hint, and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kcm.calibration import Arm, HintGate
from kcm.sample import Hint

if TYPE_CHECKING:
    from cloud_server.models import LargeModel
    from training.data import Split
    from training.judge import Predictions
    from training.run import Run

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]

MOST = 300  # samples that the large model is asked about under each arm
FEWEST = 100  # where fewer escalate, the next lowest scores are asked about as well


def gate_for(
    run: Run,
    large: LargeModel,
    split: Split,
    predictions: Predictions,
    epsilon: float,
    progress: Progress,
    *,
    plain: Float32 | None = None,
    most: int = MOST,
    seed: int = 0,
) -> HintGate:
    """Fit the gate on labelled samples [N] that neither model was fitted on, with the small model's predictions for them.

    Args:
        epsilon: on the routing score; the samples at or below it are the ones that will be asked about.
        plain: the large model's logits [N, C] without a hint, where they are known: then only the hinted arms are asked.
        most: samples to ask about; of more that escalate, so many are drawn.

    Raises:
        ValueError: `split`, `predictions` and `plain` are of different lengths, or empty.
    """
    from training.hint import fit_gate

    if not 0 < len(split) == len(predictions) == (len(split) if plain is None else len(plain)):
        raise ValueError(f"{len(split)} samples have {len(predictions)} predictions and {None if plain is None else len(plain)} answers")
    if not large.reads_hints:
        return HintGate(arm="none", reason=_deaf(run))
    rows = escalated(run.score(predictions), epsilon, most=most, seed=seed)
    asked, seen = split.take(rows), predictions.take(rows)
    confidence = run.judge.confidence(seen)
    arms: dict[Arm, NDArray[np.bool_]] = {}
    for arm, hints in hints_by_arm(seen.logits, confidence).items():
        if arm == "none" and plain is not None:
            logits = plain[rows]
        else:
            progress(f"hint gate: {len(rows)} escalated samples, {'no hint' if arm == 'none' else arm}")
            logits = large.logits(asked.payloads, hints)
        arms[arm] = logits.argmax(1) == asked.y
    return fit_gate(arms, confidence)


def _deaf(run: Run) -> str:
    if run.task.modality == "image":
        return "the large model's weight of a hint is 0, fitted where it adds nothing or not at all, and it is given none"
    return "the large model was fitted without hints and is given none: [large] hint_dropout"


def escalated(score: Float32, epsilon: float, *, most: int = MOST, fewest: int = FEWEST, seed: int = 0) -> NDArray[np.int64]:
    """Rows whose score is at most ε: of more than `most` a random draw; of fewer than `fewest` the lowest scores, as many as there are."""
    rows = np.flatnonzero(~(score > epsilon))  # NaN escalates
    if len(rows) < fewest:
        rows = np.argsort(score, kind="stable")[:fewest]
    if len(rows) > most:
        rows = np.random.default_rng(seed).choice(rows, most, replace=False)
    return np.sort(rows).astype(np.int64)


def hints_by_arm(logits: Float32, confidence: Float32) -> dict[Arm, list[Hint | None]]:
    """What the large model sees of each sample's hint under each arm, as an edge would send it.

    Args:
        logits: the small model's [N, C]. confidence: C_x [N].
    """
    from kcm.policy import gate_hint
    from training.hint import ARMS

    hints = small_hints(logits, confidence)
    return {arm: [gate_hint(hint, HintGate(arm=arm, no_hint=0.0), "")[0] for hint in hints] for arm in ARMS}


def small_hints(logits: Float32, confidence: Float32) -> list[Hint]:
    """The hint that a bundle's graph makes of the small model's logits [N, C] and C_x [N]: its best classes, best first."""
    from export.bundle import CANDIDATES
    from training.fit import softmax

    p = softmax(logits)
    best = np.argsort(-p, axis=1, kind="stable")[:, :CANDIDATES]
    hints = []
    for row, ids in enumerate(best.tolist()):
        top = tuple(min(float(value), 1.0) for value in p[row, ids])  # float32 can end a hair above one
        hints.append(Hint(label_ids=tuple(ids), probabilities=top, confidence=min(float(confidence[row]), 1.0)))
    return hints
