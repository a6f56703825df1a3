"""A decision as the cloud is told of it, and the cloud's answer as the application gets it."""

from __future__ import annotations

import numpy as np

from edge_runtime.cloud_client import Prediction
from edge_runtime.runtime import Decision, EdgeRuntime, is_finite
from kcm.sample import Answer, Float32, Hint, Purpose, Source, Tensors, payload_to_proto, scores_to_proto
from protos.kcm.v1 import cloud_pb2


def to_predict(
    decision: Decision, runtime: EdgeRuntime, *, purpose: Purpose, p_escalate: float, hint: tuple[Hint | None, float] = (None, 0.0)
) -> cloud_pb2.PredictSample:
    """The sample as it is sent, now or from the spool.

    Args:
        p_escalate: with which probability it goes to the cloud, given what is known of it: the policy itself draws none.
        hint: what the large model may see, and with which probability it was to.
    """
    shown, p_hint = hint
    payload = decision.sample.payload
    assert not isinstance(payload, Tensors)  # the router keeps them here
    confidence = decision.answer.confidence
    finite = is_finite(decision.logits, confidence)
    return cloud_pb2.PredictSample(
        sample_id=decision.answer.sample_id,
        purpose=int(purpose),  # type: ignore[arg-type]
        p_escalate=p_escalate,
        hint=None if shown is None else shown.to_proto(),
        payload=payload_to_proto(payload),
        small=scores_to_proto(decision.logits, runtime.task.label_space) if finite else None,
        # float32 sums can end a hair above one
        confidence=min(max(confidence, 0.0), 1.0) if finite else 0.0,
        bundle_id=runtime.bundle_id,
        p_hint=p_hint,
    )


def cloud_answer(decision: Decision, prediction: Prediction, labels: tuple[str, ...]) -> Answer:
    small = decision.answer
    return Answer(
        sample_id=small.sample_id,
        label_id=prediction.label_id,
        label=labels[prediction.label_id],
        source=Source.CLOUD,
        confidence=small.confidence,
        candidates=_candidates(prediction.scores, len(small.candidates)),
        model_id=prediction.teacher_id,
    )


def _candidates(scores: Float32, count: int) -> tuple[tuple[int, float], ...]:
    """The best `count` of `scores` [C] with their softmax."""
    weights = np.exp(scores - scores.max())
    best = np.argsort(-scores, kind="stable")[:count]
    return tuple(zip(best.tolist(), (weights[best] / weights.sum()).tolist(), strict=True))
