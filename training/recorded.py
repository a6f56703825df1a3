"""A trial of routing on recorded outcomes: cross-validated or held out, every system on the same rows, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.metrics import apgr, calls_for, full_curve, quantile_curve
from training.outcomes import Outcomes
from training.route import Scores, folds, judge_scores, read_views, ridge_scores

Float = NDArray[np.float64]
Progress = Callable[[str], None]
Trial = Scores  # of one shuffle: per system what a call is worth, for every row

RANDOM = 20  # draws of the random baseline
_RESAMPLES = 1000
_PARTS = {"cpt50": 0.5, "cpt80": 0.8, "cpt95": 0.95}


def cross_validated(data: Outcomes, count: int, by: str, seed: int, *, answers: bool, progress: Progress) -> Trial:
    """Each row scored by systems that were fitted without its group.

    Raises:
        DataError: fewer groups than folds, or no subjects to group by.
    """
    groups, prompt = data.groups(by), data.groups("prompt")
    views = read_views(data, answers=answers)
    trial: Trial = {}
    for number, (train, test) in enumerate(folds(groups, count, seed)):
        progress(f"shuffle {seed}, fold {number + 1} of {count}")
        train = train[~np.isin(prompt[train], prompt[test])]  # the same prompt may stand under two subjects
        found = judge_scores(data, views, train, test, groups, seed=seed, progress=progress)
        found |= _floors(data, train, test, answers=answers)
        for name, scores in found.items():
            trial.setdefault(name, np.zeros(len(data)))[test] = scores
    return trial | _fixed(data)


def held_out(train: Outcomes, test: Outcomes, *, answers: bool, progress: Progress) -> Trial:
    """The rows of `test`, scored by systems that were fitted on those rows of `train` whose prompt isn't tested.

    Raises:
        DataError: no more than one prompt is left to learn from.
    """
    whole = Outcomes(
        train.prompts + test.prompts,
        np.concatenate([train.weak, test.weak]),
        np.concatenate([train.strong, test.strong]),
        train.answers + test.answers if answers else [],
        train.subjects + [""] * len(test) if train.subjects else [],  # what a tested row is about, nobody says
    )
    groups = whole.groups("prompt")
    inside, outside = np.arange(len(train)), np.arange(len(train), len(whole))
    seen = np.isin(groups[inside], groups[outside])
    if seen.any():
        progress(f"warning: {seen.sum()} rows of the training file have a prompt of the test file; they are dropped")
    inside = inside[~seen]
    progress(f"fitting on {len(inside)} rows of the training file")
    found = judge_scores(whole, read_views(whole, answers=answers), inside, outside, groups, progress=progress)
    return found | _floors(whole, inside, outside, answers=answers) | _fixed(test)


def measure(data: Outcomes, trials: Sequence[Trial]) -> dict[str, Any]:
    """Per system apgr, apgr_exact, cpt50, cpt80, cpt95 (means over trials) with their sd, and ours minus each other, paired.

    "systems" lists them. CPT is null where a system never recovers that part of the gap.
    """
    names = list(trials[0])
    result: dict[str, Any] = {"systems": names}
    for name in names:
        figures = [_figures(data, draw) for trial in trials for draw in _draws(name, trial[name])]
        result[name] = {}
        for key in figures[0]:
            values = [value for at in figures if (value := at[key]) is not None]
            result[name][key] = float(np.mean(values)) if values else None
            result[name][key + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    rivals = [name for name in names if name not in ("ours", "oracle", "random")]
    result["paired"] = {f"ours_minus_{name}": _paired(data, [(trial["ours"], trial[name]) for trial in trials]) for name in rivals}
    return result


def mean_curve(data: Outcomes, trials: Sequence[Trial], name: str) -> tuple[Float, Float]:
    """(shares [N + 1], accuracy [N + 1]) of a system, the mean over trials."""
    curves = [full_curve(-draw, data.weak, data.strong) for trial in trials for draw in _draws(name, trial[name])]
    return np.linspace(0, 1, len(data) + 1), np.mean(curves, 0)


def _figures(data: Outcomes, worth: Float) -> dict[str, float | None]:
    weak, strong = float(data.weak.mean()), float(data.strong.mean())
    curve = full_curve(-worth, data.weak, data.strong)
    rates, accuracy = quantile_curve(-worth, data.weak, data.strong)
    return {
        "apgr": apgr(rates, accuracy, weak, strong),
        "apgr_exact": apgr(np.linspace(0, 1, len(curve)), curve, weak, strong),
        **{key: calls_for(curve, weak, strong, part) for key, part in _PARTS.items()},
    }


def _draws(name: str, worth: Float) -> list[Float]:
    """The scores themselves; of the random baseline so many orders."""
    if name != "random":
        return [worth]
    return [np.random.default_rng(seed).permutation(worth) for seed in range(RANDOM)]


def _floors(data: Outcomes, train: NDArray[np.int64], test: NDArray[np.int64], *, answers: bool) -> Scores:
    found = {"ridge": ridge_scores(data, train, test, answers=False)}
    if answers:
        found["ridge_answer"] = ridge_scores(data, train, test, answers=True)
    return found


def _fixed(data: Outcomes) -> Scores:
    """What needs no fitting: the prompt's length, chance, and knowing the outcomes."""
    return {
        "length": np.array([len(prompt) for prompt in data.prompts], np.float64),
        "random": np.arange(len(data), dtype=np.float64),
        "oracle": data.gain,
    }


def _paired(data: Outcomes, pairs: Sequence[tuple[Float, Float]], seed: int = 0) -> dict[str, float]:
    """The difference in exact APGR, mean over trials, with its 95 % percentile interval: prompts are resampled, whole."""
    groups = data.groups("prompt")
    size = int(groups.max()) + 1
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=_RESAMPLES)
    weights = np.concatenate([np.ones((1, len(data))), draws[:, groups]])  # the first row is the data as it is
    differences = np.mean([_weighted_apgr(data, one, weights) - _weighted_apgr(data, other, weights) for one, other in pairs], 0)
    low, high = np.nanpercentile(differences[1:], [2.5, 97.5])
    return {"mean": float(differences[0]), "low": float(low), "high": float(high)}


def _weighted_apgr(data: Outcomes, worth: Float, weights: Float) -> Float:
    """Exact APGR [R] of one order of the rows under each row of weights [R, N]; NaN where a resample has no gap."""
    order = np.argsort(-worth, kind="stable")
    w = weights[:, order]
    total = w.sum(1, keepdims=True)
    zero = np.zeros((len(w), 1))
    share = np.concatenate([zero, np.cumsum(w, 1)], 1) / total
    gained = np.concatenate([zero, np.cumsum(w * data.gain[order], 1)], 1) / total
    area = ((gained[:, 1:] + gained[:, :-1]) / 2 * np.diff(share, axis=1)).sum(1)
    gap = gained[:, -1]
    found: Float = np.where(gap > 0, area / np.where(gap > 0, gap, 1), np.nan)
    return found
