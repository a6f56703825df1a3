"""Does ε still hold? Compares live traffic with what calibration saw: counters, O(1) a sample, bounded memory, no clock and no chance.

What it looks at, and what it says, holds for the samples that the policy routes (route AUTO): those that an application sends LOCAL
or CLOUD by its own choice are no sample of its traffic. The tests and their rate of false alarms: edge_runtime/evidence.py.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.evidence import Losses, Scores, Share, Shift
from kcm.calibration import Calibration, Reference

SIGNALS = ("score", "escalations", "agreement_escalated", "agreement_local", "accuracy", "teacher")
REMEMBERED = 10_000  # samples; explored ones are remembered apart, so that a truth that comes late finds them
_SAMPLES, _ESCALATED, _EXPLORED = 500, 250, 100  # in a short window
_ADVICE = "ε no longer holds as calibrated: run `kcm calibrate` again on labelled samples of this traffic and install its bundle"


class Seen:
    """What is remembered of one sample; -1: not known (yet)."""

    __slots__ = ("explored", "large", "local", "small", "truth")

    def __init__(self, small: int, local: bool, explored: bool) -> None:
        self.small, self.local, self.explored = small, local, explored
        self.large = self.truth = -1


class Memory:
    """The last `size` to 2 · `size` of what was put, in two generations: forgetting costs nothing."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[str, Seen] = {}
        self._old: dict[str, Seen] = {}

    def put(self, sample_id: str, seen: Seen) -> None:
        if len(self._young) >= self._size:
            self._old, self._young = self._young, {}
        self._young[sample_id] = seen

    def get(self, sample_id: str) -> Seen | None:
        return self._young.get(sample_id) or self._old.get(sample_id)


class Drift:
    """The estimates under one calibration; another calibration gets a new one. Belongs to one thread."""

    def __init__(self, calibration: Calibration, alarm: Callable[[str], None] = lambda _: None) -> None:
        """
        Args:
            alarm: is told each signal's sentence once, when it is first raised.
        """
        self._calibration, self._tell = calibration, alarm
        self._alarms: dict[str, str] = {}
        known = calibration.reference or Reference(samples=0, cloud_rate=0.0)
        rate = known.cloud_rate if known.samples else None
        self._scores = Scores(known.quantiles, known.samples, _SAMPLES) if known.samples and known.quantiles else None
        self._escalations = Share(rate, known.samples, _SAMPLES, rises=True)
        # More agreement than in calibration harms nobody, and a hint that is shown brings some.
        self._agree_escalated = Share(known.agreement_escalated, known.escalated, _ESCALATED, rises=False)
        self._agree_local = Share(known.agreement_local, known.local, _EXPLORED, rises=False)
        self._losses = Losses(_EXPLORED)
        self._seen, self._explored = Memory(REMEMBERED), Memory(REMEMBERED)
        self._decided = self._kept = 0
        self._right = {"local": [0, 0], "escalated": [0, 0], "explored": [0, 0], "explored_large": [0, 0]}  # right, of

    @property
    def guaranteed(self) -> bool:
        """The calibration promised something, and nothing speaks against it."""
        return self._calibration.guarantee is not None and not self._alarms

    def verdict(self) -> str:
        """What moved, by how much, and what to do; empty while nothing did. It stays until another calibration serves."""
        return f"{'; '.join(self._alarms.values())}. {_ADVICE}" if self._alarms else ""

    def raised(self, signal: str) -> bool:
        return signal in self._alarms

    def estimates(self) -> dict[str, float]:
        """What is known of live traffic: shares over the last one or two windows, accuracies and the drop since this calibration."""
        known = {
            "escalation_rate": self._escalations.live,
            "agreement_escalated": self._agree_escalated.live,
            "agreement_local": self._agree_local.live,
            "accuracy_local": _share(self._right["local"]),
            "accuracy_escalated": _share(self._right["escalated"]),
            "accuracy_drop": self._drop(),
        }
        return {name: value for name, value in known.items() if value is not None}

    def decided(self, sample_id: str, label_id: int, score: float, *, local: bool, explored: bool = False) -> None:
        """The policy routed a sample: the small model's label, the routing score, and who answers."""
        self._decided += 1
        self._kept += local
        (self._explored if explored else self._seen).put(sample_id, Seen(label_id, local, explored))
        if self._scores is not None and (shift := self._scores.add(score)):
            self._raise("score", f"{_parts(shift)} samples score at most {shift.at:.4g}, {shift.expected:.1%} did in calibration")
        if shift := self._escalations.add(not local):
            self._raise("escalations", f"{_parts(shift)} samples escalate, {shift.expected:.1%} did in calibration")

    def replied(self, sample_id: str, label_id: int, *, small: int = -1) -> None:
        """The large model's label came.

        Args:
            small: of an explored sample, the small model's label, in case the sample is forgotten: the reply may come hours later.
        """
        seen = self._find(sample_id)
        if seen is None:
            if small >= 0:
                self._agreed(self._agree_local, "agreement_local", small == label_id)
            return
        if seen.large >= 0 or (seen.local and not seen.explored):
            return  # the same id again, sent by the application's choice, is no sample of what stays here
        seen.large = label_id
        if seen.local:
            self._agreed(self._agree_local, "agreement_local", seen.small == label_id)
        else:
            self._agreed(self._agree_escalated, "agreement_escalated", seen.small == label_id)
        self._compare(seen)

    def answered_by(self, teacher_id: str, prompt_id: str) -> None:
        """Who answered in the cloud. A calibration that was measured against another teacher or prompt promises nothing about this one."""
        expected = self._calibration
        moved = [
            f"{name} {found!r}, ε was calibrated with {wanted!r}"
            for name, found, wanted in (("teacher", teacher_id, expected.teacher_id), ("prompt", prompt_id, expected.prompt_id))
            if wanted and found != wanted
        ]
        if moved:
            self._raise("teacher", f"the cloud answers with {' and with '.join(moved)}")

    def truth(self, sample_id: str, label_id: int) -> bool:
        """The truth about a sample came; False: it is not remembered. The first one counts."""
        seen = self._find(sample_id)
        if seen is None:
            return False
        if seen.truth < 0:
            seen.truth = label_id
            if seen.local:
                _count(self._right["local"], seen.small == label_id)
            self._compare(seen)
        return True

    def _find(self, sample_id: str) -> Seen | None:
        return self._seen.get(sample_id) or self._explored.get(sample_id)

    def _agreed(self, share: Share, signal: str, agree: bool) -> None:
        if shift := share.add(agree):
            where = "escalated" if signal == "agreement_escalated" else "explored"
            sentence = f"small and large model agree on {_parts(shift)} {where} samples, on {shift.expected:.1%} in calibration"
            self._raise(signal, sentence)

    def _compare(self, seen: Seen) -> None:
        """Once the large model's label and the truth are both there."""
        if seen.large < 0 or seen.truth < 0:
            return
        small, large = seen.small == seen.truth, seen.large == seen.truth
        if not seen.local:
            _count(self._right["escalated"], large)
            return
        _count(self._right["explored"], small)
        _count(self._right["explored_large"], large)
        guarantee = self._calibration.guarantee
        # Answers of the cloud cost nothing against always asking it: the drop is that of the samples kept here, times their share.
        if guarantee is not None and self._losses.add(large - small, guarantee.max_drop / self._local_share()):
            number = self._right["explored"][1]
            sentence = (
                f"on {number} explored samples with a known truth the large model is right on {_share(self._right['explored_large']):.1%}, "
                f"the small one on {_share(self._right['explored']):.1%}: {100 * (self._drop() or 0):.1f} points of accuracy "
                f"over all traffic, {100 * guarantee.max_drop:.1f} were promised"
            )
            self._raise("accuracy", sentence)

    def _drop(self) -> float | None:
        small, large = _share(self._right["explored"]), _share(self._right["explored_large"])
        return None if small is None or large is None else (large - small) * self._local_share()

    def _local_share(self) -> float:
        return (self._kept + 1) / (self._decided + 1)

    def _raise(self, signal: str, sentence: str) -> None:
        if signal not in self._alarms:
            self._alarms[signal] = sentence
            self._tell(f"{sentence}. {_ADVICE}")


def _parts(shift: Shift) -> str:
    return f"{shift.live:.1%} of the last {shift.samples}"


def _count(pair: list[int], hit: bool) -> None:
    pair[0] += hit
    pair[1] += 1


def _share(pair: list[int]) -> float | None:
    return pair[0] / pair[1] if pair[1] else None
