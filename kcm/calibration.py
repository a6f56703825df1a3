"""What a calibration says: the head that routes, its ε, the hint's gate, the promise, and what traffic looked like.

`kcm calibrate` writes it into a run, export puts it into a bundle (one per precision), the edge acts on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
HeadName = Literal["confidence", "correctness", "benefit", "max-softmax"]
Arm = Literal["none", "candidates", "assertion"]


class HeadEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """A head on the selection split: mean accuracy at 10 to 40 % cloud calls; the difference is to max-softmax, 95 % interval."""

    accuracy: float
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


class HeadChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which head makes the routing score, and why. `evidence` is empty where nothing could be compared."""

    head: HeadName = "confidence"
    reason: str = "not selected: the judge's confidence routes"
    samples: int = 0
    evidence: dict[str, HeadEvidence] = {}


class ArmEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """The large model under one arm of the hint, on escalated labelled samples; the difference is to no hint, paired, 95 %."""

    accuracy: float
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


class HintGate(msgspec.Struct, frozen=True, kw_only=True):
    """What of the hint the large model may see: `arm` where C_x ≥ lowest, else nothing.

    A share `no_hint` of the samples that would get a hint goes without, chosen by a hash of the sample id: it keeps measuring the effect.
    """

    arm: Arm = "none"
    lowest: Share = 0.0
    no_hint: Share = 0.02
    reason: str = "not fitted: an untested hint can pull the large model down, so none is shown"
    samples: int = 0
    evidence: dict[str, ArmEvidence] = {}


class Guarantee(msgspec.Struct, frozen=True, kw_only=True):
    """With probability ≥ confidence over the calibration draw, routing by ε loses at most `max_drop` against always asking the large model.

    It holds for traffic like the calibration split's, for this teacher, prompt and hint gate.
    """

    max_drop: float  # in accuracy: 0.005 is half a point
    confidence: float
    upper: float  # upper confidence bound of the drop at ε
    effective_n: float
    method: str


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What traffic looked like when ε was chosen: the edge compares its own with it.

    quantiles: of the routing score at i/(Q + 1), i = 1..Q. agreement_*: share of samples on which small and large model agree,
    among those that escalate and those that stay, with their numbers; null where the large model wasn't asked.
    """

    samples: int
    cloud_rate: float
    quantiles: tuple[float, ...] = ()
    agreement_escalated: float | None = None
    escalated: int = 0
    agreement_local: float | None = None
    local: int = 0


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """ε on the routing score, how it was chosen, and what it is worth."""

    epsilon: float
    method: str = "fixed"  # fixed, cloud-rate, accuracy or guarantee
    target: float | None = None
    samples: int = 0
    cloud_rate: float | None = None  # on the calibration split
    cloud_rate_interval: tuple[float, float] | None = None  # 95 %, Wilson
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    teacher_id: str = ""  # whose answers it was measured against; "" where none were
    prompt_id: str = ""
    head: HeadChoice = HeadChoice()
    hint: HintGate = HintGate()
    guarantee: Guarantee | None = None
    reference: Reference | None = None


class Calibration(Threshold, frozen=True, kw_only=True):
    """A threshold of one precision in a bundle; `calibration_id` names everything that it holds for."""

    calibration_id: str
