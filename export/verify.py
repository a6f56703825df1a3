"""Do torch and ONNX Runtime agree, on logits and on decisions?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from export.precisions import tokenizer_json
from export.session import Session
from kcm.bundle import Bundle
from kcm.errors import VerifyError
from kcm.preprocess import load_preprocessor
from kcm.sample import Payload
from training.run import Run
from training.small import Small

LOGITS = 1e-3  # relative to the largest logit
CONFIDENCE = 1e-3  # and of the routing score: a decision may differ only where it lies this near to ε


@dataclass(frozen=True)
class Report:
    """`decisions` counts samples that one side keeps and the other escalates; `excused` of them lie within CONFIDENCE of ε."""

    samples: int
    logits_error: float
    confidence_error: float
    score_error: float
    labels: int
    decisions: int
    excused: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def verify(run: Run, kind: Small, bundle: Bundle, payloads: Sequence[Payload]) -> Report:
    """Compare the run in torch with the bundle's fp32 graph on `payloads`.

    Raises:
        VerifyError: logits, labels, C_x, the routing score or a decision differ beyond the bars, or the bundle is of another run.
    """
    if bundle.task.label_space != run.task.label_space:
        raise VerifyError(f"{bundle.path} has other labels than the run")
    made = bundle.manifest
    if (made.task_id, made.round, made.teacher_id) != (run.task.id, run.info.round, run.info.teacher_id):
        raise VerifyError(f"{bundle.path} was not exported from this run", fix="give the run that it came from, or export again")
    epsilon = bundle.calibration["fp32"].epsilon
    if epsilon != run.threshold.epsilon:
        raise VerifyError(f"{bundle.path} has ε = {epsilon:.4f}, the run {run.threshold.epsilon:.4f}", fix="export again")
    if tokenizer_json(run) != bundle.files.get("tokenizer.json", b""):
        raise VerifyError(f"{bundle.path} has another tokenizer.json than the run")
    predictions = kind.predict(run.small, kind.featurise(payloads))
    confidence, score = run.judge.confidence(predictions), run.score(predictions)
    preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
    session = Session(bundle.model("fp32"))
    out = session.answer(preprocessor, payloads)
    logits, c, s, top = (out[name] for name in ("logits", "confidence", "score", "top_ids"))

    moved = (s > epsilon) != (score > epsilon)
    excused = moved & (np.abs(score - epsilon) < CONFIDENCE)
    # A tie between two labels may break either way; a label that leads by more than the bar may not change.
    scale = max(1.0, float(np.abs(predictions.logits).max()))
    lead = np.take_along_axis(predictions.logits, top[:, :1], 1)[:, 0] >= predictions.logits.max(1) - 2 * LOGITS * scale
    report = Report(
        samples=len(payloads),
        logits_error=float(np.abs(logits - predictions.logits).max()) / scale,
        confidence_error=float(np.abs(c - confidence).max()),
        score_error=float(np.abs(s - score).max()),
        labels=int((~lead).sum()),
        decisions=int(moved.sum()),
        excused=int(excused.sum()),
    )
    wrong = [
        # not >: a NaN differs too
        f"logits differ by {report.logits_error:.2e} (bar {LOGITS:g})" if not report.logits_error <= LOGITS else "",
        f"C_x differs by {report.confidence_error:.2e} (bar {CONFIDENCE:g})" if not report.confidence_error <= CONFIDENCE else "",
        f"the routing score differs by {report.score_error:.2e} (bar {CONFIDENCE:g})" if not report.score_error <= CONFIDENCE else "",
        f"{report.labels} answers differ" if report.labels else "",
        f"{report.decisions - report.excused} decisions differ away from ε" if report.decisions > report.excused else "",
    ]
    if any(wrong):
        raise VerifyError(f"{bundle.path}: " + "; ".join(w for w in wrong if w), fix="export the run again; if it stays, this is a bug")
    return report
