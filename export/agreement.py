"""What a narrower precision costs: its answers, decisions and accuracy beside fp32's, each at its own ε."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.session import Outputs, Session
from kcm.bundle import Bundle, Precision
from kcm.errors import VerifyError
from kcm.preprocess import load_preprocessor
from kcm.sample import Payload

LOSS = 0.003  # of all samples: what a precision may lose in right local answers, at equal cloud calls
UNLIKE = 0.1  # share of other answers above which a precision is broken, whatever labels say
_WITNESSES = 1  # a net loss of so many samples is no evidence, however few there are


@dataclass(frozen=True)
class Side:
    """One precision at its ε: megabytes of its graph, share of cloud calls, and of the small model's right answers overall and kept."""

    megabytes: float
    epsilon: float
    cloud_rate: float
    accuracy: float | None
    local_accuracy: float | None


@dataclass(frozen=True)
class Agreement:
    """A precision beside fp32 on `samples` payloads, `labelled` of them with the truth.

    labels: answers that differ. decisions: samples that one keeps and the other escalates. logits and score: largest differences.
    lost: right local answers that the precision gives less than fp32 where it keeps as many samples, as a share of the labelled ones.
    """

    precision: Precision
    samples: int
    labelled: int
    labels: int
    decisions: int
    logits: float
    score: float
    plain: Side
    lowered: Side
    lost: float | None

    @property
    def wrong(self) -> str:
        """What is beyond the bar, or empty."""
        if not np.isfinite([self.logits, self.score]).all():
            return f"{self.precision} gives outputs that are no numbers"
        if self.labels > UNLIKE * self.samples:
            return f"{self.precision} answers {self.labels} of {self.samples} samples differently"
        if self.lost is not None and self.lost * self.labelled > max(LOSS * self.labelled, _WITNESSES):
            return f"{self.precision} loses {100 * self.lost:.2f} points (bar {100 * LOSS:g}) at fp32's share of cloud calls"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreements(bundle: Bundle, payloads: Sequence[Payload], labels: NDArray[np.int64] | None) -> list[Agreement]:
    """Each precision of the bundle but fp32, beside it, in ONNX Runtime.

    Args:
        labels: [N] ids, −1 where the truth of a sample isn't known; None: of none.
    """
    others: list[Precision] = [precision for precision in bundle.manifest.precisions if precision != "fp32"]
    if not others:
        return []
    preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
    truth = np.full(len(payloads), -1) if labels is None else labels
    plain = Session(bundle.model("fp32")).answer(preprocessor, payloads)
    return [_beside(bundle, p, plain, Session(bundle.model(p)).answer(preprocessor, payloads), truth) for p in others]


def hold(found: Sequence[Agreement], bundle: Bundle) -> None:
    """Raises VerifyError where a precision loses more than LOSS, or has little in common with fp32."""
    if wrong := "; ".join(a.wrong for a in found if a.wrong):
        raise VerifyError(f"{bundle.path}: {wrong}", fix="export without that precision: kcm export RUN --out DIR --precision ...")


def table(found: Sequence[Agreement]) -> str:
    """The precisions side by side, and what they can't tell without labels."""
    lines = ["precision     MB        ε   calls   small   kept    answers  decisions    lost"]
    for name, side, other in [("fp32", found[0].plain, None), *((a.precision, a.lowered, a) for a in found)]:
        line = f"{name:9} {side.megabytes:6.1f}   {side.epsilon:6.4f}  {side.cloud_rate:6.1%}"
        line += f"  {_share(side.accuracy)}  {_share(side.local_accuracy)}"
        if other is not None:
            lost = "      –" if other.lost is None else f"{100 * other.lost:+7.2f}"
            line += f"   {other.labels / other.samples:7.2%}    {other.decisions / other.samples:7.2%} {lost}"
        lines.append(line)
    lines.append("answers, decisions: share that differs from fp32; lost: points of right local answers at fp32's share of calls")
    if not found[0].labelled:
        lines.append("no labels: how well they answer can't be told, only how alike; --samples FILE with labels, or test under [data]")
    return "\n".join(lines)


def _beside(bundle: Bundle, precision: Precision, plain: Outputs, lowered: Outputs, truth: NDArray[np.int64]) -> Agreement:
    known = truth >= 0
    outs: dict[Precision, Outputs] = {"fp32": plain, precision: lowered}
    local = [out["score"] > bundle.calibration[name].epsilon for name, out in outs.items()]
    answers = [out["top_ids"][:, 0] for out in outs.values()]
    lost = None
    if known.any():
        # The same number stays local: so what is compared is the answers and the ranking, not two shares of calls.
        kept = int(local[0][known].sum())
        scores = [out["score"][known] for out in outs.values()]
        right = [_right_among(s, a[known] == truth[known], kept) for s, a in zip(scores, answers, strict=True)]
        lost = (right[0] - right[1]) / int(known.sum())
    return Agreement(
        precision=precision,
        samples=len(truth),
        labelled=int(known.sum()),
        labels=int((answers[0] != answers[1]).sum()),
        decisions=int((local[0] != local[1]).sum()),
        logits=float(np.abs(plain["logits"] - lowered["logits"]).max()),
        score=float(np.abs(plain["score"] - lowered["score"]).max()),
        plain=_side(bundle, "fp32", plain, truth),
        lowered=_side(bundle, precision, lowered, truth),
        lost=lost,
    )


def _side(bundle: Bundle, precision: Precision, out: Outputs, truth: NDArray[np.int64]) -> Side:
    epsilon = bundle.calibration[precision].epsilon
    local, known = out["score"] > epsilon, truth >= 0
    right = out["top_ids"][:, 0] == truth
    return Side(
        megabytes=len(bundle.model(precision)) / 1e6,
        epsilon=epsilon,
        cloud_rate=float(1 - local.mean()),
        accuracy=float(right[known].mean()) if known.any() else None,
        local_accuracy=float(right[known & local].mean()) if (known & local).any() else None,
    )


def _right_among(score: NDArray[np.float32], right: NDArray[np.bool_], kept: int) -> int:
    """Right answers among the `kept` samples with the highest scores."""
    return int(right[np.argsort(-score, kind="stable")[:kept]].sum())


def _share(value: float | None) -> str:
    return "    –" if value is None else f"{value:6.1%}"
