"""The whole loop offline, per seed and round: small, large and routed accuracy, and the baselines of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate
from kcm.task import Task
from training.data import Split
from training.evaluate import RATES, Routed, curve, paired_interval, route
from training.floor import TfidfLinear
from training.judge import Predictions, max_softmax
from training.rounds import Loop, Stream, Teacher
from training.small import Small

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a simulation runs on. `large_test` are the large model's logits [N, C] on the test split."""

    task: Task
    kind: Small
    train: Split
    stream: Split
    test: Split
    teacher: Teacher
    large_test: Float32
    rounds: int
    share: float  # of the stream that may be escalated for learning
    floor: bool = True


@dataclass
class SeedResult:
    """JSON rows of one seed, and per round and target which test samples each system answered rightly, for paired intervals."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    right: list[dict[str, dict[float, Routed]]] = field(default_factory=list)


def simulate_seed(setting: Setting, seed: int, progress: Progress) -> SeedResult:
    """One seed: it draws the stream's order, the folds and the judge's start."""
    result = SeedResult()
    stream = Stream.draw(len(setting.stream), setting.rounds, seed)
    test_x = setting.kind.featurise(setting.test.texts)
    large_right = setting.large_test.argmax(1) == setting.test.y
    progress("round 0: fit on the edge's labels")
    loop = Loop(setting.task, setting.kind, setting.train, setting.stream, setting.teacher, seed=seed)
    floor = _Floor(setting, stream) if setting.floor else None
    for number in range(setting.rounds + 1):
        if number:
            loop.advance(stream.chunks[number - 1], stream.reserve, setting.share)
            if floor:
                floor.advance(stream.chunks[number - 1])
        predictions = setting.kind.predict(loop.fitted.small, test_x)
        row, curves = _measure(setting, loop, predictions, loop.predict(stream.reserve), large_right)
        row = {
            "round": number,
            **row,
            "escalated_of_stream": len(loop.escalated) / max(1, len(setting.stream)),
            "teacher_epsilon": loop.spec.teacher_epsilon,
            "teacher_rows_used": loop.passed,
        }
        if floor:
            row["floor"], curves["floor"] = floor.measure(large_right)
        result.rows.append(row)
        result.right.append(curves)
        at = row["curve"]["0.3"]
        progress(
            f"round {number}: small {row['small_accuracy']:.3f}, KCM at 30 % calls {at['accuracy']:.3f}, large {row['large_accuracy']:.3f}"
        )
    return result


def _measure(
    setting: Setting, loop: Loop, predictions: Predictions, reserve: Predictions, large_right: NDArray[np.bool_]
) -> tuple[dict[str, Any], dict[str, dict[float, Routed]]]:
    """One round's row: at the task's ε, and the curves of judge, twin judge and temperature-scaled max-softmax."""
    fitted = loop.fitted
    small_right = predictions.logits.argmax(1) == setting.test.y
    scores: dict[str, Callable[[Predictions], Float32]] = {
        "kcm": fitted.judge.confidence,
        "twin": fitted.twin.confidence,
        "max_softmax": lambda p: max_softmax(p.logits, fitted.temperature),
    }
    curves = {name: curve(score(reserve), score(predictions), small_right, large_right) for name, score in scores.items()}
    at = route(fitted.judge.confidence(predictions), small_right, large_right, setting.task.judge.epsilon)
    twin, cost = fitted.twin.spec.kind, setting.task.cost
    points = {
        str(rate): {
            "accuracy": curves["kcm"][rate].accuracy,
            "realised_rate": curves["kcm"][rate].cloud_rate,
            "max_softmax_accuracy": curves["max_softmax"][rate].accuracy,
            "max_softmax_realised_rate": curves["max_softmax"][rate].cloud_rate,
            f"{twin}_accuracy": curves["twin"][rate].accuracy,
            f"{twin}_realised_rate": curves["twin"][rate].cloud_rate,
            # The small model runs for every sample; the task's own prices.
            "cost_per_1000": 1000 * (cost.local_call + curves["kcm"][rate].cloud_rate * cost.cloud_call),
        }
        for rate in RATES
    }
    row = {
        "small_accuracy": float(small_right.mean()),
        "large_accuracy": float(large_right.mean()),
        "epsilon": setting.task.judge.epsilon,
        "kcm_accuracy": at.accuracy,
        "cloud_rate": at.cloud_rate,
        "curve": points,
    }
    return row, curves


class _Floor:
    """The baseline of the same run: TF-IDF + linear + max-softmax, with the large model's hard answers, same chunks and budget."""

    def __init__(self, setting: Setting, stream: Stream) -> None:
        self._setting, self._reserve = setting, stream.reserve
        self._texts, self._labels = list(setting.train.texts), setting.train.y
        self._fit()

    def _fit(self) -> None:
        self._model = TfidfLinear(self._texts, self._labels, len(self._setting.task.labels))

    def _confidence(self, index: NDArray[np.int64]) -> Float32:
        confidence: Float32 = self._model.probabilities([self._setting.stream.texts[i] for i in index]).max(1)
        return confidence

    def advance(self, chunk: NDArray[np.int64]) -> None:
        epsilon = epsilon_for_rate(self._confidence(self._reserve), self._setting.share)
        chosen = chunk[self._confidence(chunk) <= epsilon][: int(self._setting.share * len(chunk))]
        texts = [self._setting.stream.texts[i] for i in chosen]
        self._texts += texts
        self._labels = np.concatenate([self._labels, self._setting.teacher(texts).argmax(1)])
        self._fit()

    def measure(self, large_right: NDArray[np.bool_]) -> tuple[dict[str, Any], dict[float, Routed]]:
        p = self._model.probabilities(self._setting.test.texts)
        small_right = p.argmax(1) == self._setting.test.y
        points = curve(self._confidence(self._reserve), p.max(1), small_right, large_right)
        row = {str(rate): {"accuracy": point.accuracy, "realised_rate": point.cloud_rate} for rate, point in points.items()}
        return {"small_accuracy": float(small_right.mean()), "curve": row}, points


def summarise(results: list[SeedResult]) -> dict[str, Any]:
    """The JSON of a simulation: seeds, the last round's mean and sd over seeds, and paired differences with 95 % intervals."""
    last = [result.rows[-1] for result in results]
    against = [name for name in ("max_softmax", "twin", "floor") if name in results[0].right[-1]]
    return {
        "schema": 1,
        "seeds": [{"seed": seed, "rounds": result.rows} for seed, result in enumerate(results)],
        "mean": _fold(last, lambda values: float(np.mean(values))),
        "sd": _fold(last, lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0),
        "paired": {
            f"kcm_minus_{name}": {
                str(rate): _paired([result.right[-1] for result in results], name, rate)
                for rate in RATES
                if 0 < rate < 1 or name == "floor"
            }
            for name in against
        },
    }


def _paired(rounds: list[dict[str, dict[float, Routed]]], other: str, rate: float) -> dict[str, float]:
    """KCM minus `other` at one target, in accuracy: mean and 95 % interval over seeds and samples."""
    differences = np.array([r["kcm"][rate].right.astype(float) - r[other][rate].right for r in rounds])
    mean, low, high = paired_interval(differences)
    return {"mean": mean, "low": low, "high": high}


def _fold(rows: list[Any], reduce: Callable[[list[float]], float]) -> Any:
    """The same structure as each row, its numbers reduced over rows."""
    if isinstance(rows[0], dict):
        return {key: _fold([row[key] for row in rows], reduce) for key in rows[0]}
    return reduce(rows)
