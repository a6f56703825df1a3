"""The whole loop offline, per seed and round: small, large and routed accuracy, and the baselines of the same run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate
from kcm.preprocess import as_text
from kcm.sample import Payload
from kcm.task import Task, with_method
from training.data import Split
from training.evaluate import RATES, Routed, auroc, curve, paired_interval, route
from training.floor import TfidfLinear
from training.groups import by_group, frequency_groups
from training.judge import Predictions, max_softmax
from training.retrieval.recall import rank_of_truth, recall
from training.rounds import Loop, Stream, Teacher
from training.select import Selection, choose
from training.small import Small

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]

GROUPED_AT = 0.3  # share of cloud calls at which the routed system's accuracy is split into groups of classes


@dataclass(frozen=True)
class Setting:
    """What a simulation runs on. `large_test` are the large model's logits [N, C] on the test split.

    `selection`: labelled samples, in no other split, by which the head that routes is chosen and fitted; None: C_x routes.
    `outside`: samples of no class of the task, which ought to escalate.
    `frequency` [C] says which classes are the long tail's; without it the edge's own labels do.
    """

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
    frequency: NDArray[np.int64] | None = None
    selection: Split | None = None
    outside: tuple[Payload, ...] = ()

    @cached_property
    def stream_features(self) -> Any:
        """Made once for all seeds and methods."""
        return self.kind.featurise(self.stream.payloads)

    @cached_property
    def test_features(self) -> Any:
        return self.kind.featurise(self.test.payloads)

    @cached_property
    def outside_features(self) -> Any:
        return self.kind.featurise(list(self.outside))

    @cached_property
    def selection_features(self) -> Any:
        return self.kind.featurise(self.selection.payloads) if self.selection else None

    def selected(self, small: Any) -> Selection | None:
        """The selection samples as a small model and the large one answer them."""
        if self.selection is None:
            return None
        return Selection(self.kind.predict(small, self.selection_features), self.teacher(self.selection.payloads), self.selection.y)

    @cached_property
    def class_frequency(self) -> NDArray[np.int64]:
        return np.bincount(self.train.y, minlength=len(self.task.labels)) if self.frequency is None else self.frequency


@dataclass
class SeedResult:
    """JSON rows of one seed, and per round and target which test samples each system answered rightly, for paired intervals."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    right: list[dict[str, dict[float, Routed]]] = field(default_factory=list)


def simulate_seed(setting: Setting, seed: int, progress: Progress, method: str = "") -> SeedResult:
    """One seed: it draws the stream's order, the folds and the judge's start. `method`: distil by this one instead of the task's.

    Raises:
        ConfigError: no such method.
    """
    result, task = SeedResult(), with_method(setting.task, method) if method else setting.task
    stream = Stream.draw(len(setting.stream), setting.rounds, seed)
    large_right = setting.large_test.argmax(1) == setting.test.y
    progress("round 0: fit on the edge's labels")
    loop = Loop(task, setting.kind, setting.train, setting.stream, setting.teacher, seed=seed, features=setting.stream_features)
    floor = _Floor(setting, stream) if setting.floor else None
    for number in range(setting.rounds + 1):
        if number:
            loop.advance(stream.chunks[number - 1], stream.reserve, setting.share)
            if floor:
                floor.advance(stream.chunks[number - 1])
        predictions = setting.kind.predict(loop.fitted.small, setting.test_features)
        row, curves = _measure(setting, loop, predictions, loop.predict(stream.reserve), large_right)
        row = {
            "round": number,
            **row,
            "reserve": len(stream.reserve),
            "escalated_of_stream": len(loop.escalated) / max(1, len(setting.stream)),
            "teacher_epsilon": loop.spec.teacher_epsilon,
            "teacher_rows_used": loop.passed,
            "round_0_accuracy": float((loop.fitted.out_of_fold.logits[: len(setting.train)].argmax(1) == setting.train.y).mean()),
        }
        if floor:
            row["floor"], curves["floor"] = floor.measure(large_right)
        result.rows.append(row)
        result.right.append(curves)
        at = row["curve"]["0.3"]
        progress(
            f"round {number}: small {row['small_accuracy']:.3f}, at 30 % calls {at['accuracy']:.3f}, large {row['large_accuracy']:.3f}"
        )
    return result


def _measure(
    setting: Setting, loop: Loop, predictions: Predictions, reserve: Predictions, large_right: NDArray[np.bool_]
) -> tuple[dict[str, Any], dict[str, dict[float, Routed]]]:
    """One round's row: at the task's ε, and the curves of judge, twin judge and temperature-scaled max-softmax."""
    fitted, selection = loop.fitted, setting.selected(loop.fitted.small)
    small_right = predictions.logits.argmax(1) == setting.test.y
    router = choose(fitted.judge, "auto", selection, loop.taught)
    scores: dict[str, Callable[[Predictions], Float32]] = {
        "kcm": router.score,
        "confidence": fitted.judge.confidence,
        # The same head with the other kind of judge, of as many parameters.
        "twin": choose(fitted.twin, router.choice.head, selection, loop.taught).score,
        "confidence_twin": fitted.twin.confidence,
        "max_softmax": lambda p: max_softmax(p.logits, fitted.temperature),
    }
    curves = {name: curve(score(reserve), score(predictions), small_right, large_right) for name, score in scores.items()}
    # The paper's ε stands on C_x, whatever head routes at the targets below.
    at = route(fitted.judge.confidence(predictions), small_right, large_right, setting.task.judge.epsilon)
    names, cost = {"twin": fitted.twin.spec.kind}, setting.task.cost
    points = {}
    for rate in RATES:
        points[str(rate)] = {
            "accuracy": curves["kcm"][rate].accuracy,
            "realised_rate": curves["kcm"][rate].cloud_rate,
            # The small model runs for every sample; the task's own prices.
            "cost_per_1000": 1000 * (cost.local_call + curves["kcm"][rate].cloud_rate * cost.cloud_call),
        }
        for name in ("confidence", "twin", "max_softmax"):
            points[str(rate)][f"{names.get(name, name)}_accuracy"] = curves[name][rate].accuracy
            points[str(rate)][f"{names.get(name, name)}_realised_rate"] = curves[name][rate].cloud_rate
    row: dict[str, Any] = {
        "small_accuracy": float(small_right.mean()),
        "large_accuracy": float(large_right.mean()),
        "epsilon": setting.task.judge.epsilon,
        "kcm_accuracy": at.accuracy,
        "cloud_rate": at.cloud_rate,
        "head": router.choice.head,
        "grouped_at": GROUPED_AT,
        "curve": points,
        "groups": _groups(setting, {"small": small_right, "kcm": curves["kcm"][GROUPED_AT].right, "large": large_right}),
    }
    if setting.task.gallery.file:
        truth = setting.test.y
        places = (rank_of_truth(predictions.logits, truth), rank_of_truth(setting.large_test, truth))
        routed = {name: scores[name] for name in ("kcm", "twin", "confidence", "max_softmax")}
        row["recall"] = recall({name: (score(reserve), score(predictions)) for name, score in routed.items()}, *places, GROUPED_AT)
    if setting.outside:
        outside = setting.kind.predict(fitted.small, setting.outside_features)
        inside = np.arange(len(predictions) + len(outside)) < len(predictions)
        # The logits' level says more about samples of no class than any score of being right, which shares them out.
        ranked: dict[str, Callable[[Predictions], Float32]] = {**scores, "largest_logit": lambda p: p.logits.max(1)}
        found = {name: auroc(np.concatenate([score(predictions), score(outside)]), inside) for name, score in ranked.items()}
        return {**row, "outside_auroc": found}, curves
    return row, curves


def _groups(setting: Setting, right: dict[str, NDArray[np.bool_]]) -> dict[str, dict[str, float]]:
    """Per system its accuracy on frequent, middling and rare classes; a group without a test sample is left out."""
    rows = by_group(
        frequency_groups(setting.class_frequency), setting.test.y, {name: answers.astype(float) for name, answers in right.items()}
    )
    held = {group: row["accuracy"] for group, row in rows.items() if row["samples"]}
    return {name: {group: accuracy[name] for group, accuracy in held.items()} for name in right}


class _Floor:
    """The baseline of the same run: TF-IDF + linear + max-softmax, with the large model's hard answers, same chunks and budget."""

    def __init__(self, setting: Setting, stream: Stream) -> None:
        self._setting, self._reserve = setting, stream.reserve
        self._payloads, self._labels = list(setting.train.payloads), setting.train.y
        self._fit()

    def _fit(self) -> None:
        self._model = TfidfLinear([as_text(payload) for payload in self._payloads], self._labels, len(self._setting.task.labels))

    def _probabilities(self, payloads: Sequence[Payload]) -> Float32:
        return self._model.probabilities([as_text(payload) for payload in payloads])

    def _confidence(self, index: NDArray[np.int64]) -> Float32:
        confidence: Float32 = self._probabilities([self._setting.stream.payloads[i] for i in index]).max(1)
        return confidence

    def advance(self, chunk: NDArray[np.int64]) -> None:
        epsilon = epsilon_for_rate(self._confidence(self._reserve), self._setting.share)
        chosen = chunk[self._confidence(chunk) <= epsilon][: int(self._setting.share * len(chunk))]
        asked = [self._setting.stream.payloads[i] for i in chosen]
        self._payloads += asked
        self._labels = np.concatenate([self._labels, self._setting.teacher(asked).argmax(1)])
        self._fit()

    def measure(self, large_right: NDArray[np.bool_]) -> tuple[dict[str, Any], dict[float, Routed]]:
        p = self._probabilities(self._setting.test.payloads)
        small_right = p.argmax(1) == self._setting.test.y
        points = curve(self._confidence(self._reserve), p.max(1), small_right, large_right)
        row = {str(rate): {"accuracy": point.accuracy, "realised_rate": point.cloud_rate} for rate, point in points.items()}
        return {"small_accuracy": float(small_right.mean()), "curve": row}, points


def summarise(results: list[SeedResult]) -> dict[str, Any]:
    """The JSON of a simulation: seeds, the last round's mean and sd over seeds, and paired differences with 95 % intervals."""
    last = [result.rows[-1] for result in results]
    kind, other = ("kan", "mlp") if "mlp_accuracy" in last[0]["curve"]["0.0"] else ("mlp", "kan")
    against = [name for name in ("max_softmax", "confidence", "twin", "floor") if name in results[0].right[-1]]
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
        }
        | {
            # The ablation of the paper: C_x of a KAN against that of an MLP, whatever head routes.
            f"{kind}_minus_{other}": {
                str(rate): _paired([result.right[-1] for result in results], "confidence_twin", rate, "confidence")
                for rate in RATES
                if 0 < rate < 1
            }
        },
    }


def compare_methods(results: dict[str, list[SeedResult]]) -> dict[str, Any]:
    """The last method (KCM where it is among them) minus each other, in accuracy at each target, paired over seeds and samples.

    Target 0.0 is the small model alone.
    """
    best = "kcm" if "kcm" in results else list(results)[-1]
    found = {}
    for name in results:
        if name != best:
            pairs = zip(results[best], results[name], strict=True)
            rounds = [{"kcm": ours.right[-1]["kcm"], name: theirs.right[-1]["kcm"]} for ours, theirs in pairs]
            found[f"{best}_minus_{name}"] = {str(rate): _paired(rounds, name, rate) for rate in RATES if rate < 1}
    return found


def _paired(rounds: list[dict[str, dict[float, Routed]]], other: str, rate: float, one: str = "kcm") -> dict[str, float]:
    """`one` minus `other` at one target, in accuracy: mean and 95 % interval over seeds and samples."""
    differences = np.array([r[one][rate].right.astype(float) - r[other][rate].right for r in rounds])
    mean, low, high = paired_interval(differences)
    return {"mean": mean, "low": low, "high": high}


def _fold(rows: list[Any], reduce: Callable[[list[float]], float]) -> Any:
    """The same structure as each row, its numbers reduced over rows, its words counted."""
    if isinstance(rows[0], str):
        return " ".join(f"{name} {count}" for name, count in sorted(Counter(rows).items()))
    if isinstance(rows[0], dict):
        return {key: _fold([row[key] for row in rows], reduce) for key in rows[0]}
    return reduce(rows)
