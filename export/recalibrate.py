"""ε for another precision: what chose the run's ε, done again on the scores that this precision's own graph gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.session import Outputs, Session
from kcm.calibration import Threshold
from kcm.errors import DataError
from kcm.preprocess import Preprocessor
from kcm.sample import Payload
from training.calibrate import fixed, for_accuracy, for_promise, for_rate, reference, with_accuracy
from training.guarantee import promise, sequence
from training.run import Run

Float32 = NDArray[np.float32]

ROWS = 1000  # texts that go through each graph at most: an encoder takes half a minute for them


@dataclass(frozen=True)
class Basis:
    """The texts [N] that ε is chosen on, what fp32 makes of them, and which out-of-fold predictions they have; None: they are fresh."""

    preprocessor: Preprocessor
    payloads: Sequence[Payload]
    plain: Outputs
    rows: NDArray[np.int64] | None


def basis(run: Run, plain: Session, preprocessor: Preprocessor, fresh: Sequence[Payload]) -> Basis:
    """
    Args:
        fresh: texts like the traffic's that the run wasn't fitted on (kcm.app.samples.fresh_payloads). Without any, the run's out-of-fold
            predictions stand in, with what rounding does to the same texts' logits in the final model added: the folds' own models
            are gone.
    """
    source = fresh or run.payloads
    rows = np.unique(np.linspace(0, len(source) - 1, min(ROWS, len(source))).astype(np.int64))
    texts = [source[row] for row in rows]
    return Basis(preprocessor, texts, plain.answer(preprocessor, texts), None if fresh else rows)


def recalibrated(run: Run, on: Basis, session: Session, judge: Session) -> Threshold:
    """The run's threshold for a precision's graph: a fixed ε stays, a rate and an accuracy get a new ε, a promise is made anew.

    The rate is the one that the run's ε has in fp32 on the same samples: precisions are to make the same calls.

    Args:
        session: of the fused graph in the precision.
        judge: its judge alone (export.graph.fuse_judge).

    Raises:
        DataError: the run's ε stands on labels, and it keeps no answers of its calibration samples, or they don't support the same
            target in this precision.
    """
    old = run.threshold
    before, after = _scores(run, on, session, judge)
    answered = session.answer(on.preprocessor, run.answered.payloads) if run.answered else None
    if old.method in ("accuracy", "guarantee"):
        new = _by_labels(run, answered, after)
    elif old.method == "cloud-rate":
        new = msgspec.structs.replace(for_rate(after, float((before <= old.epsilon).mean())), target=old.target)
    else:
        new = fixed(after, old.epsilon)
    witnesses: tuple[NDArray[np.bool_], Float32] | tuple[()] = ()
    if answered is not None and run.answered is not None:
        chosen = answered["logits"].argmax(1)
        small_right, large_right = chosen == run.answered.labels, run.answered.large == run.answered.labels
        new = with_accuracy(new, answered["score"], small_right, large_right)
        witnesses = (chosen == run.answered.large, answered["score"])
    seen = None if old.reference is None else reference(after, new.epsilon, *witnesses)
    return msgspec.structs.replace(new, teacher_id=old.teacher_id, prompt_id=old.prompt_id, head=old.head, hint=old.hint, reference=seen)


def _by_labels(run: Run, answered: Outputs | None, scores: Float32) -> Threshold:
    old, rows = run.threshold, run.answered
    if rows is None or answered is None:
        raise DataError(
            "the run keeps no answers of the calibration samples that its ε stands on, which other precisions need",
            fix="kcm calibrate RUN --large FOLDER ...   again, as before; or export fp32 alone",
        )
    score = answered["score"]
    small, large = answered["logits"].argmax(1) == rows.labels, rows.large == rows.labels
    if old.guarantee is not None:
        made = promise(score, small, large, sequence(scores), max_drop=old.guarantee.max_drop, confidence=old.guarantee.confidence)
        return for_promise(score, small, large, made)
    assert old.target is not None
    return for_accuracy(score, small, large, old.target)


def _scores(run: Run, on: Basis, session: Session, judge: Session) -> tuple[Float32, Float32]:
    """Routing scores [N] in fp32 and in the precision."""
    narrow = session.answer(on.preprocessor, on.payloads)
    if on.rows is None:
        return on.plain["score"], narrow["score"]
    held = run.out_of_fold.take(on.rows)
    logits = held.logits + (narrow["logits"] - on.plain["logits"])
    inputs = {"small_logits": logits, "length": held.length[:, None], "unknown": held.unknown[:, None]}
    return run.score(held), judge.run(inputs)["score"]
