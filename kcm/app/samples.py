"""What calibration reads: fresh traffic for a call rate, labelled samples with both models' answers, truths that were told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kcm.app.progress import Steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloud_server.models import LargeModel
    from kcm.calibration import HintGate
    from kcm.sample import Payload
    from kcm.task import Task
    from training.data import Split
    from training.judge import Predictions
    from training.run import Answered, Run
    from training.select import Selection
    from training.small import Small


@dataclass(frozen=True)
class Labelled:
    """Labelled samples [N] that nothing was fitted on, with what the small model computes of them and the large one's logits [N, C]."""

    split: Split
    predictions: Predictions
    large: NDArray[np.float32]

    @property
    def small_right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.predictions.logits.argmax(1) == self.split.y
        return right

    @property
    def large_right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.large.argmax(1) == self.split.y
        return right

    @property
    def agree(self) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = self.predictions.logits.argmax(1) == self.large.argmax(1)
        return same

    @property
    def answered(self) -> Answered:
        from training.run import Answered

        return Answered(self.split.payloads, self.split.y, self.large.argmax(1))

    @property
    def selection(self) -> Selection:
        from training.select import Selection

        return Selection(self.predictions, self.large, self.split.y)


def labelled_splits(task: Task, *, divided: bool) -> tuple[Split | None, Split]:
    """(selection, calibration) samples with their labels, none in both; the first is None where nothing is to be chosen.

    Raises:
        DataError: the task names no calibration file.
    """
    from training.calibrate import distinct, divide
    from training.data import identity, load_split

    whole = distinct(load_split(task, "calibration"))
    if task.data.selection:
        first = distinct(load_split(task, "selection"))
        shared = set(map(identity, first.payloads))
        return first, whole.take([i for i, payload in enumerate(whole.payloads) if identity(payload) not in shared])
    return divide(whole) if divided else (None, whole)


def asked(run: Run, kind: Small, large: LargeModel, split: Split | None, steps: Steps) -> Labelled | None:
    """The samples with both models' outputs; None where there are none."""
    if split is None or len(split) == 0:
        return None
    steps(f"large model: {len(split)} labelled samples")
    answers = large.logits(split.payloads, [None] * len(split))
    return Labelled(split, kind.predict(run.small, kind.featurise(split.payloads)), answers)


def with_truths(run: Run, kind: Small, store: Path, samples: Selection | None, teacher_id: str, steps: Steps) -> Selection:
    """The selection samples [N], with the store's truths about texts that nothing was fitted on behind them.

    Each part counts as many samples as it is worth: the truths' weights are scaled to their effective number.
    """
    import numpy as np

    from training.data import identity
    from training.reserve import reserved
    from training.select import Selection
    from training.truths import read_truths

    seen = set(map(identity, run.payloads))
    told = read_truths(
        store, run.task, lambda payload: identity(payload) not in seen and (run.info.round == 0 or reserved(payload)), teacher_id
    )
    steps(f"{len(told.payloads)} truths of the store, worth {told.effective_n:.0f} equal samples")
    weights = told.weights * np.float32(told.effective_n / told.weights.sum())
    predictions = kind.predict(run.small, kind.featurise(told.payloads))
    if samples is None:
        return Selection(predictions, told.large, told.labels, weights)
    return Selection(
        type(predictions).concatenate([samples.predictions, predictions]),
        np.concatenate([samples.large, told.large]),
        np.concatenate([samples.labels, told.labels]),
        np.concatenate([np.ones(len(samples), np.float32), weights]),
    )


def under_gate(run: Run, samples: Labelled, gate: HintGate, large: LargeModel, steps: Steps) -> Labelled:
    """The same samples, answered by the large model with the hints that the gate lets through."""
    from kcm.app.hint import small_hints
    from kcm.policy import gate_hint

    steps(f"large model: {len(samples.split)} labelled samples, hints as gated")
    shown = msgspec.structs.replace(gate, no_hint=0.0)
    hints = small_hints(samples.predictions.logits, run.judge.confidence(samples.predictions))
    answers = large.logits(samples.split.payloads, [gate_hint(hint, shown, "")[0] for hint in hints])
    return replace(samples, large=answers)


def unlabelled_scores(run: Run, kind: Small) -> tuple[NDArray[np.float32], str]:
    """Routing scores [N] of what a call rate is read off, and what that is: fresh samples of the stream, else out of fold."""
    fresh = fresh_payloads(run)
    if fresh:
        return run.score(kind.predict(run.small, kind.featurise(fresh))), f"{len(fresh)} fresh samples of the stream"
    return run.score(run.out_of_fold), f"{len(run.payloads)} out-of-fold predictions"


def fresh_payloads(run: Run) -> Sequence[Payload]:
    """Samples of the task's stream that are like its traffic and that no run was fitted on; empty where the task names no stream.

    Round 0 learnt from none of it. A later round learnt from what escalated, which leaves easy ones behind: there only the
    reserved tenth is still like the traffic.
    """
    from training.data import identity, load_split
    from training.reserve import reserved

    if not run.task.data.stream:
        return []
    seen, stream = set(map(identity, run.payloads)), load_split(run.task, "stream")

    def fresh(payload: Payload) -> bool:
        return identity(payload) not in seen and (run.info.round == 0 or reserved(payload))

    return stream.take([i for i, payload in enumerate(stream.payloads) if fresh(payload)]).payloads


def scores(run: Run, kind: Small, payloads: Sequence[Payload]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Routing scores [N] and the small model's answers [N] for samples that it wasn't fitted on."""
    predictions = kind.predict(run.small, kind.featurise(payloads))
    return run.score(predictions), predictions.logits.argmax(1)
