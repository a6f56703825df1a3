"""The protocol by which routing is measured: scores and outcomes in, figures out. Arrays only; no model, no file.

A system is a score per sample, higher stays local. At a target rate its ε comes from calibration samples, the same ones for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate
from kcm.task import CostSpec
from training.evaluate import auroc, paired_interval, resampled, wilson
from training.metrics import (
    apgr,
    brier,
    calls_for,
    ece,
    full_curve,
    quantile_curve,
    reliability,
    right_at,
    risk_coverage,
    share_escalated,
)

Float = NDArray[np.floating]
Bool = NDArray[np.bool_]
Json = dict[str, Any]

SCHEMA = 1
OURS = "kcm"
ORACLE = "oracle"
GRID = np.linspace(0, 1, 101)
TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PAIRED = (0.1, 0.2, 0.3, 0.4)
CPT = (0.5, 0.8, 0.95)
SEEDS = 5  # of the protocol
_BOOTSTRAP = 2000  # of a band
_BOOTSTRAP_SCORES = 300  # of a figure that must sort again each time


@dataclass(frozen=True)
class Score:
    """A system's routing score on the test samples [N], on the calibration samples [M], and on labelled calibration samples [K].

    calibration is None for the oracle, which has no threshold; labelled is None where the task keeps no such labels back.
    probability: it claims to be the probability that the small model is right.
    """

    test: Float
    calibration: Float | None
    labelled: Float | None = None
    probability: bool = False


@dataclass(frozen=True)
class Trial:
    """One run on the frozen test split: who is right on each sample [N], and every system's scores, several where it draws by chance.

    labelled: (small right, large right), each [K], on the labelled calibration samples.
    """

    small_right: Bool
    large_right: Bool
    systems: dict[str, list[Score]]
    labelled: tuple[Bool, Bool] | None = None

    def sides(self, system: str) -> tuple[Bool, Bool]:
        """Who is right locally and in the cloud. The oracle may leave a call out, so the large model never costs it an answer."""
        return self.small_right, self.small_right | self.large_right if system == ORACLE else self.large_right


def oracle(small_right: Bool, large_right: Bool) -> Score:
    """The best that labels allow with at most so many calls: first what only the large model knows, the rest in any order."""
    return Score(np.arange(len(small_right)) / len(small_right) / 2 - (large_right & ~small_right), None)


def figures(score: Score, small_right: Bool, large_right: Bool, strong: float, *, ranks_small: bool) -> dict[str, float | None]:
    """The figures of one score; None where one is undefined. `strong`: the large model's accuracy (the oracle's own sides are better)."""
    weak, curve = float(small_right.mean()), full_curve(score.test, small_right, large_right)
    cpt = {f"cpt{round(100 * part)}": calls_for(curve, weak, strong, part) for part in CPT}
    mixed = ranks_small and not small_right.all() and small_right.any()
    return {
        "apgr": apgr(*quantile_curve(score.test, small_right, large_right), weak, strong),
        "apgr_exact": apgr(np.linspace(0, 1, len(curve)), curve, weak, strong),
        **cpt,
        "aurc": float(risk_coverage(score.test if ranks_small else small_right.astype(float), small_right).mean()),
        "auroc": auroc(score.test, small_right) if mixed else None,
        "ece": ece(score.test, small_right) if score.probability else None,
        "brier": brier(score.test, small_right) if score.probability else None,
    }


def measure(trials: Sequence[Trial], cost: CostSpec) -> Json:
    """Every system's figures, curves and targets over the trials: mean ± sd, of one trial bootstrap intervals (95 %)."""
    return {
        "systems": {name: _system(trials, name, cost) for name in trials[0].systems},
        "references": {
            "always-small": _reference([t.small_right for t in trials], 0.0, 1000 * cost.local_call),
            "always-large": _reference([t.large_right for t in trials[:1]], 1.0, 1000 * cost.cloud_call),
        },
        "paired": {name: _paired(trials, name) for name in trials[0].systems if name != OURS},
    }


def _system(trials: Sequence[Trial], name: str, cost: CostSpec) -> Json:
    small, large = trials[0].sides(name)
    single = trials[0].systems[name][0] if len(trials) == len(trials[0].systems[name]) == 1 else None
    rows = [_figures(t, name, score) for t in trials for score in t.systems[name]]
    spreads = {key: spread([row[key] for row in rows]) for key in rows[0]}
    if single is not None:
        for key, interval in _bootstrapped(trials[0], name, single).items():
            spreads[key].update(zip(("low", "high"), interval, strict=True))
    points = np.array([right_at(score.test, *t.sides(name), GRID).mean(1) for t in trials for score in t.systems[name]])
    curve = {"rate": GRID.tolist(), "accuracy": points.mean(0).tolist(), **_band(points)}
    if single is not None:
        low, high = np.percentile(
            resampled(len(small), _BOOTSTRAP, 0)[0] @ right_at(single.test, small, large, GRID).T / len(small), [2.5, 97.5], 0
        )
        curve.update(low=low.tolist(), high=high.tolist())
    return {
        **spreads,
        "targets": [_target(trials, name, rate, cost) for rate in TARGETS],
        "curve": curve,
        "risk_coverage": _risk(trials, name),
        "reliability": _pooled_reliability(trials, name),
    }


def _figures(trial: Trial, name: str, score: Score) -> dict[str, float | None]:
    return figures(score, *trial.sides(name), float(trial.large_right.mean()), ranks_small=name != ORACLE)


def _bootstrapped(trial: Trial, name: str, score: Score) -> dict[str, tuple[float | None, float | None]]:
    """95 % percentile intervals of the figures over resampled test samples; (None, None) where a figure is undefined."""
    rng, n = np.random.default_rng(0), len(trial.small_right)
    drawn = []
    for _ in range(_BOOTSTRAP_SCORES):
        i = rng.integers(n, size=n)
        part = Trial(trial.small_right[i], trial.large_right[i], {})
        drawn.append(_figures(part, name, Score(score.test[i], None, probability=score.probability)))
    out: dict[str, tuple[float | None, float | None]] = {}
    for key in drawn[0]:
        values = [value for row in drawn if (value := row[key]) is not None]
        # A figure that most resamples can't define has no interval either.
        low, high = np.percentile(values, [2.5, 97.5]).tolist() if len(values) > len(drawn) / 2 else (None, None)
        out[key] = (low, high)
    return out


def spread(values: Sequence[float | None]) -> Json:
    """Mean and sd of the values that are defined; sd is None for fewer than two."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "low": None,
        "high": None,
        "values": len(known),
    }


def _band(points: Float) -> Json:
    if len(points) < 2:
        return {"low": None, "high": None}
    mean, sd = points.mean(0), points.std(0, ddof=1)
    return {"low": (mean - sd).tolist(), "high": (mean + sd).tolist()}


def at_target(trial: Trial, name: str, rate: float) -> tuple[Float, Float]:
    """Correctness and share escalated of each test sample [N], with ε for this rate from the calibration samples, over all draws.

    The oracle has no ε: it makes at most that share of calls.
    """
    small, large = trial.sides(name)
    right, up = np.zeros(len(small)), np.zeros(len(small))
    for score in trial.systems[name]:
        if score.calibration is None:
            escalated = share_escalated(score.test, np.array([rate]))[0] * (large & ~small)
        else:
            escalated = (score.test <= epsilon_for_rate(score.calibration, rate)).astype(float)
        up += escalated
        right += escalated * large + (1 - escalated) * small
    draws = len(trial.systems[name])
    return right / draws, up / draws


def _target(trials: Sequence[Trial], name: str, rate: float, cost: CostSpec) -> Json:
    each = [at_target(Trial(t.small_right, t.large_right, {name: [s]}), name, rate) for t in trials for s in t.systems[name]]
    accuracy, calls = spread([float(right.mean()) for right, _ in each]), spread([float(up.mean()) for _, up in each])
    if len(each) == 1:
        for found, values in zip((accuracy, calls), each[0], strict=True):
            found["low"], found["high"] = paired_interval(values)[1:]
    exact = [float(right_at(s.test, *t.sides(name), np.array([rate])).mean()) for t in trials for s in t.systems[name]]
    thresholds = [epsilon_for_rate(s.calibration, rate) for t in trials for s in t.systems[name] if s.calibration is not None]
    return {
        "target": rate,
        "epsilon": spread(thresholds)["mean"],
        "calls": calls,
        "accuracy": accuracy,
        "expected_accuracy": spread([_expected(t, s, rate) for t in trials for s in t.systems[name]])["mean"],
        "accuracy_at_exact_calls": spread(exact),
        "cost_per_1000": 1000 * (cost.local_call + calls["mean"] * cost.cloud_call),
    }


def _expected(trial: Trial, score: Score, rate: float) -> float | None:
    """The accuracy that the labelled calibration samples promise at this ε; None without any."""
    if trial.labelled is None or score.labelled is None or score.calibration is None:
        return None
    up = score.labelled <= epsilon_for_rate(score.calibration, rate)
    return float(np.where(up, trial.labelled[1], trial.labelled[0]).mean())


def _reference(right: Sequence[Bool], calls: float, price: float) -> Json:
    accuracy = spread([float(r.mean()) for r in right])
    if len(right) == 1:
        accuracy["low"], accuracy["high"] = wilson(int(right[0].sum()), right[0].size)
    return {"accuracy": accuracy, "calls": calls, "cost_per_1000": price}


def _risk(trials: Sequence[Trial], name: str) -> Json:
    """The risk-coverage curve on a grid, its mean over trials and draws."""
    rows = []
    for trial in trials:
        for score in trial.systems[name]:
            risk = risk_coverage(trial.small_right.astype(float) if name == ORACLE else score.test, trial.small_right)
            rows.append(risk[np.maximum(1, np.round(GRID[1:] * len(risk)).astype(int)) - 1])
    return {"coverage": GRID[1:].tolist(), "risk": np.mean(rows, 0).tolist()}


def _pooled_reliability(trials: Sequence[Trial], name: str) -> list[Json] | None:
    if not trials[0].systems[name][0].probability:
        return None
    claims = np.concatenate([t.systems[name][0].test for t in trials])
    return reliability(claims, np.concatenate([t.small_right for t in trials]), len(trials))


def _paired(trials: Sequence[Trial], name: str) -> dict[str, Json]:
    """Ours minus a system in accuracy, over seeds and samples: at calibrated ε, and at exactly equal shares of calls."""

    def exact(trial: Trial, system: str, rate: float) -> Float:
        rows = [right_at(s.test, *trial.sides(system), np.array([rate]))[0] for s in trial.systems[system]]
        mean: Float = np.mean(rows, 0)
        return mean

    def difference(right: Callable[[Trial, str], Float]) -> Json:
        values = paired_interval(np.array([right(t, OURS) - right(t, name) for t in trials]))
        return dict(zip(("mean", "low", "high"), values, strict=True))

    return {
        f"{rate:g}": {
            "calibrated": difference(lambda t, s, r=rate: at_target(t, s, r)[0]),  # type: ignore[misc]
            "exact": difference(lambda t, s, r=rate: exact(t, s, r)),  # type: ignore[misc]
        }
        for rate in PAIRED
    }
