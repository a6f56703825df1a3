"""The hint's gate, fitted: is the large model better with the small model's candidates, its one answer or neither, and from which C_x on?

A hint pulls the large model towards the small one: a gain where that is right, a loss where it isn't. How much of either is a
property of the pair, so it is measured, on labelled samples that escalate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kcm.calibration import Arm, ArmEvidence, HintGate
from training.evaluate import paired_interval
from training.fit import fold_of

Float = NDArray[np.floating]
Bool = NDArray[np.bool_]

ARMS: tuple[Arm, ...] = ("none", "candidates", "assertion")
FEWEST = 40  # samples below which no hint is given: chance would choose
QUANTILES = (0.25, 0.5, 0.75)  # of C_x: a few places for the threshold, since each more is a chance to be fooled
_FOLDS = 5
_MARGIN = 1.0  # standard errors by which a finer rule must beat the plain one


@dataclass(frozen=True)
class Rule:
    """Show `arm` where C_x ≥ lowest."""

    arm: Arm
    lowest: float = 0.0

    def right(self, arms: Mapping[Arm, Bool], confidence: Float) -> Bool:
        """[N], which answers are right under this rule."""
        right: Bool = np.where(confidence >= self.lowest, arms[self.arm], arms["none"])
        return right


NEVER, ALWAYS = Rule("none"), Rule("candidates")


def fit_gate(arms: Mapping[Arm, Bool], confidence: Float) -> HintGate:
    """The gate that these outcomes speak for, with evidence per arm and, as "gate", for the fitted rule itself, cross-validated.

    Args:
        arms: per arm, "none" and "candidates" at least, whether the large model was right on each of N escalated samples [N].
        confidence: their C_x [N].

    Raises:
        ValueError: no samples, an arm that is unknown or lacks, lengths that differ, or a C_x that is no probability.
    """
    _check(arms, confidence)
    n = len(confidence)
    if n < FEWEST:
        reason = f"{n} escalated samples with labels are too few to choose by: it takes {FEWEST}"
        return HintGate(arm="none", reason=reason, samples=n, evidence=_evidence(arms, arms["none"]))
    rule = choose_rule(arms, confidence)
    evidence = _evidence(arms, _held_out(arms, confidence))
    return HintGate(arm=rule.arm, lowest=rule.lowest, reason=_reason(rule, arms, confidence), samples=n, evidence=evidence)


def choose_rule(arms: Mapping[Arm, Bool], confidence: Float) -> Rule:
    """Never or always by the mean alone; a finer rule where it beats the better of these by a standard error of the paired difference.

    Of two rules the better mean keeps the largest possible regret smallest: to lean to one side by a standard error triples it on
    the other. A finer rule is the best of several, which by chance alone looks better than it is: so the margin.
    """
    plain = ALWAYS if arms["candidates"].sum() > arms["none"].sum() else NEVER
    base = plain.right(arms, confidence).astype(np.float64)
    cuts = [0.0, *np.quantile(np.asarray(confidence, np.float64), QUANTILES).tolist()]
    best, lead = plain, 0.0
    for arm in arms:
        for lowest in cuts if arm != "none" else []:
            rule = Rule(arm, lowest)
            gain = rule.right(arms, confidence) - base
            sure = float(gain.mean() - _MARGIN * gain.std(ddof=1) / len(gain) ** 0.5)
            if sure > lead:
                best, lead = rule, sure
    return best


def _held_out(arms: Mapping[Arm, Bool], confidence: Float) -> Bool:
    """[N]: what is right where each fold's rule is chosen on the others."""
    # Not stratified by outcome: folds that are each other's copies would tell each other what to choose.
    folds = fold_of(np.zeros(len(confidence), np.int64), _FOLDS, seed=0)
    right = np.zeros(len(confidence), bool)
    for fold in range(_FOLDS):
        inside, outside = folds != fold, folds == fold
        rule = choose_rule({arm: values[inside] for arm, values in arms.items()}, confidence[inside])
        right[outside] = rule.right({arm: values[outside] for arm, values in arms.items()}, confidence[outside])
    return right


def _evidence(arms: Mapping[Arm, Bool], gated: Bool) -> dict[str, ArmEvidence]:
    return {name: _against(values, arms["none"]) for name, values in [*arms.items(), ("gate", gated)]}


def _against(right: Bool, none: Bool) -> ArmEvidence:
    mean, low, high = paired_interval(right.astype(np.float64) - none)
    return ArmEvidence(accuracy=float(right.mean()), difference=mean, interval=(low, high))


def _reason(rule: Rule, arms: Mapping[Arm, Bool], confidence: Float) -> str:
    n = len(confidence)
    if rule.arm == "none":
        told = "; ".join(f"{arm} {_points(_against(right, arms['none']))}" for arm, right in arms.items() if arm != "none")
        return f"the hint doesn't help this large model on {n} escalated samples: {told}"
    found = f"{_points(_against(rule.right(arms, confidence), arms['none']))} against no hint on {n} escalated samples"
    return found if rule.lowest == 0.0 else f"where C_x is at least {rule.lowest:.3f}, a wrong hint below costs more: {found}"


def _points(found: ArmEvidence) -> str:
    low, high = found.interval
    return f"{100 * found.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _check(arms: Mapping[Arm, Bool], confidence: Float) -> None:
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"arm {unknown[0]!r} of the hint is unknown: {', '.join(ARMS)}")
    if lacking := [arm for arm in ("none", "candidates") if arm not in arms]:
        raise ValueError(f"outcomes under arm {lacking[0]!r} are missing")
    if len(confidence) == 0:
        raise ValueError("no samples to fit the hint's gate on")
    for arm, right in arms.items():
        if np.shape(right) != np.shape(confidence) or np.ndim(right) != 1:
            raise ValueError(f"arm {arm!r} has outcomes of shape {np.shape(right)}, C_x has {np.shape(confidence)}")
    if not ((confidence >= 0.0) & (confidence <= 1.0)).all():
        raise ValueError("a C_x is no probability")
