"""From runs and a large model to the protocol's trials: scores of every system, latency, and what an escalated sample weighs."""

from __future__ import annotations

import os
import platform
import shlex
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_server.models import LargeModel, load_large
from kcm.app.progress import Steps
from kcm.app.samples import fresh_payloads
from kcm.errors import ConfigError, MissingExtraError
from kcm.policy import gate_hint
from kcm.preprocess import load_preprocessor
from kcm.sample import Hint, Payload, Purpose, payload_to_proto, scores_to_proto
from kcm.task import Task
from protos.kcm.v1 import cloud_pb2
from training.calibrate import distinct, divide
from training.data import Split, identity, load_split
from training.evaluate import auroc
from training.fit import softmax
from training.judge import Judge, Predictions, fit_judge, max_softmax
from training.protocol import OURS, Score, Trial, oracle
from training.run import Run, load_run
from training.small import Small

Float32 = NDArray[np.float32]
Float = NDArray[np.floating]
Scorer = Callable[[Predictions], Float]

RANDOM_SEEDS = 20
LOCAL_SAMPLES, CLOUD_SAMPLES = 200, 100
_CHUNK = 500  # texts between two words on progress
_BUNDLE_ID = "0" * 16  # as long as a real one
_TABLES = ("root", "data", "preprocess", "small", "judge")  # of the task: what makes a run of round 0


@dataclass(frozen=True)
class Evaluated:
    """One run with its trial. `test` are the small model's predictions; `score` [N] routes."""

    folder: Path
    run: Run
    trial: Trial
    test: Predictions
    score: Float
    twin: str  # the kind of the equal-size judge
    longer_escalates: bool
    calibration: tuple[str, int]  # what the call rates are read off, and how many


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, which must be seeds of one program.

    Raises:
        ConfigError: one is unreadable, given twice, of another task or settings, or of another round.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is given twice", fix="give each run once: several runs are seeds")
    runs = [load_run(folder) for folder in folders]
    first = runs[0]
    for folder, run in zip(folders, runs, strict=True):
        if run.task.id != first.task.id or run.task.label_space != first.task.label_space:
            raise ConfigError(f"{folder} is of task {run.task.id}, {folders[0]} of task {first.task.id}", fix="give runs of one task")
        if run.info.round != first.info.round:
            raise ConfigError(
                f"{folder} is round {run.info.round}, {folders[0]} round {first.info.round}: several runs are seeds of one round",
                fix=_by_round(folders, runs),
            )
        tables = _TABLES if run.info.round == 0 else (*_TABLES, "distill")
        if other := [name for name in tables if getattr(run.task, name) != getattr(first.task, name)]:
            raise ConfigError(
                f"{folder} and {folders[0]} differ in {other[0]}: they are no seeds of one program", fix="evaluate them one by one"
            )
        if run.threshold.head.head != first.threshold.head.head:
            raise ConfigError(
                f"{folder} is routed by {run.threshold.head.head}, {folders[0]} by {first.threshold.head.head}",
                fix="kcm calibrate RUN --head NAME   gives them the same head",
            )
    return runs


def _by_round(folders: Sequence[Path], runs: Sequence[Run]) -> str:
    """The command per round that evaluates its runs."""
    rounds: dict[int, list[str]] = {}
    for folder, run in zip(folders, runs, strict=True):
        rounds.setdefault(run.info.round, []).append(shlex.quote(str(folder)))
    commands = [f"kcm eval {' '.join(of_round)} --large FOLDER" for _, of_round in sorted(rounds.items())]
    return "\n       ".join(["a report per round, to lay side by side:", *commands])


class Large:
    """The large model in process."""

    def __init__(self, folder: Path, task: Task, steps: Steps) -> None:
        """Raises ConfigError where it isn't one, or answers with other labels."""
        self.model: LargeModel = load_large(folder)
        self._steps = steps
        if self.model.labels != task.labels:
            raise ConfigError(
                f"{folder} answers with {len(self.model.labels)} labels that are not task {task.id}'s {len(task.labels)}",
                fix=f"kcm train-large --task {task.id} --out {folder} --force",
            )

    def right(self, split: Split) -> NDArray[np.bool_]:
        """Whether it is right on each labelled sample, asked without a hint."""
        right: NDArray[np.bool_] = self.answers(split).argmax(1) == split.y
        return right

    def answers(self, split: Split) -> NDArray[np.float32]:
        """Its logits [N, C], without a hint."""
        parts = []
        for start in range(0, len(split), _CHUNK):
            self._steps(f"large model: {split.name}, {start} of {len(split)}")
            payloads = split.payloads[start : start + _CHUNK]
            parts.append(self.model.logits(payloads, [None] * len(payloads)))
        return np.concatenate(parts)

    def latency(self, payloads: Sequence[Payload]) -> list[float]:
        """Milliseconds per text, one at a time."""
        for text in payloads[:3]:
            self.model.logits([text], [None])
        return [_milliseconds(lambda text=text: self.model.logits([text], [None])) for text in payloads[:CLOUD_SAMPLES]]  # type: ignore[misc]


def labelled_split(task: Task) -> Split | None:
    """Labels that were kept back to calibrate on, less those that heads are selected by; None where there are none."""
    if not task.data.calibration:
        return None
    whole = distinct(load_split(task, "calibration"))
    if not task.data.selection:
        return divide(whole)[1] or None
    shared = set(map(identity, load_split(task, "selection").payloads))
    return whole.take([i for i, payload in enumerate(whole.payloads) if identity(payload) not in shared]) or None


class Features:
    """A small model's features, made once for the same texts: seeds share most of them."""

    def __init__(self, kind: Small) -> None:
        self._kind, self._known = kind, dict[tuple[Payload, ...], Any]()

    def predict(self, run: Run, payloads: Sequence[Payload]) -> Predictions:
        key = tuple(payloads)
        if key not in self._known:
            self._known[key] = self._kind.featurise(payloads)
        return self._kind.predict(run.small, self._known[key])


def evaluate_run(
    folder: Path,
    run: Run,
    features: Features,
    test: Split,
    large_right: NDArray[np.bool_],
    labelled: tuple[Split, NDArray[np.bool_]] | None,
) -> Evaluated:
    """Every system's scores on the test, calibration and labelled samples of one run.

    Args:
        labelled: calibration samples with labels, and the large model's correctness there.
    """
    predictions = features.predict(run, test.payloads)
    small_right = predictions.logits.argmax(1) == test.y
    fresh = fresh_payloads(run)
    calibration = features.predict(run, fresh) if fresh else run.out_of_fold
    source = "fresh samples of the stream" if fresh else "out-of-fold predictions of its training texts"
    kept = features.predict(run, labelled[0].payloads) if labelled else None
    own = run.out_of_fold.take(np.flatnonzero(run.labelled))
    own_right = own.logits.argmax(1) == run.targets[run.labelled].argmax(1)
    short_first = auroc(-own.length, own_right) if 0 < own_right.sum() < len(own_right) else 1.0
    scorers, probabilities, twin = _scorers(run, longer_escalates=short_first >= 0.5)

    def scored(name: str, scorer: Scorer) -> Score:
        return Score(scorer(predictions), scorer(calibration), None if kept is None else scorer(kept), name in probabilities)

    systems = {name: [scored(name, scorer) for scorer in draws] for name, draws in scorers.items()}
    systems["oracle"] = [oracle(small_right, large_right)]
    outcomes = (kept.logits.argmax(1) == labelled[0].y, labelled[1]) if kept is not None and labelled is not None else None
    return Evaluated(
        folder=folder,
        run=run,
        trial=Trial(small_right, large_right, systems, outcomes),
        test=predictions,
        score=systems[OURS][0].test,
        twin=twin,
        longer_escalates=short_first >= 0.5,
        calibration=(source, len(calibration)),
    )


def _scorers(run: Run, *, longer_escalates: bool) -> tuple[dict[str, list[Scorer]], set[str], str]:
    """Per system its scores, which of them claim a probability, and the kind of the equal-size judge. Scores lie in −1..1."""
    temperature = run.info.temperature
    twin = fit_twin(run)
    by_judge = run.threshold.head.head in ("confidence", "correctness", "max-softmax")

    def length(p: Predictions) -> Float:
        short = 1 / (1 + p.length.astype(np.float64))
        return short if longer_escalates else 1 - short

    scorers: dict[str, list[Scorer]] = {
        OURS: [run.score],
        "confidence": [run.judge.confidence],
        twin.spec.kind: [twin.confidence],
        "tempered": [lambda p: max_softmax(p.logits, temperature)],
        "max-softmax": [lambda p: max_softmax(p.logits)],
        "entropy": [_low_entropy],
        "margin": [_margin],
        "length": [length],
        "random": [_by_chance(run.info.seed, draw) for draw in range(RANDOM_SEEDS)],
    }
    if run.threshold.head.head == "confidence":
        del scorers["confidence"]  # it is what routes
    return scorers, {"confidence", twin.spec.kind, "tempered", "max-softmax"} | ({OURS} if by_judge else set()), twin.spec.kind


def fit_twin(run: Run) -> Judge:
    """The judge of the other kind with as many parameters, fitted on the same out-of-fold predictions."""
    spec = msgspec.structs.replace(run.task.judge, kind="mlp" if run.task.judge.kind == "kan" else "kan")
    return fit_judge(spec, run.out_of_fold, run.targets, run.info.seed)


def _low_entropy(p: Predictions) -> Float:
    q = softmax(p.logits).astype(np.float64)
    entropy = -(q * np.log(np.maximum(q, 1e-30))).sum(1)
    return np.asarray(1 - entropy / np.log(q.shape[1]))


def _margin(p: Predictions) -> Float:
    top = np.sort(softmax(p.logits), 1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])


def _by_chance(*seed: int) -> Scorer:
    # The samples are in the seed: test and calibration must not get the same draws.
    return lambda p: np.random.default_rng([*seed, zlib.crc32(p.logits.tobytes())]).random(len(p))


def local_latency(run: Run, kind: Small, payloads: Sequence[Payload]) -> tuple[list[float], str]:
    """Milliseconds per text, one at a time, from text to answer and C_x; and what answered: the exported graph, else the model in torch."""
    answer, what = _local(run, kind)
    for text in payloads[:10]:
        answer(text)
    return [_milliseconds(lambda text=text: answer(text)) for text in payloads[:LOCAL_SAMPLES]], what  # type: ignore[misc]


def _local(run: Run, kind: Small) -> tuple[Callable[[Payload], object], str]:
    try:
        from export.bundle import CANDIDATES, fuse
        from export.precisions import tokenizer_json
        from export.session import Session

        session = Session(fuse(run, min(CANDIDATES, len(run.task.labels))))
    except (ModuleNotFoundError, MissingExtraError):
        return lambda text: run.judge.confidence(kind.predict(run.small, kind.featurise([text]))), "PyTorch (no ONNX Runtime here)"
    tokenizer = tokenizer_json(run)
    preprocessor = load_preprocessor(run.task.preprocess, {"tokenizer.json": tokenizer} if tokenizer else {})
    return lambda text: session.run(preprocessor.batch([text])), "the exported ONNX graph, ONNX Runtime on the CPU"


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def machine() -> str:
    """What measured: processor and cores, no name and no path of the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0] if named else model
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, one thread a model{load}"


def message_sizes(run: Run, predictions: Predictions, payloads: Sequence[Payload], escalated: NDArray[np.bool_]) -> list[int]:
    """Bytes of each escalated sample's message as the edge builds it, its hint through the gate."""
    from export.bundle import CANDIDATES

    task = run.task
    p, confidence = softmax(predictions.logits), run.judge.confidence(predictions)
    sizes = []
    for row in np.flatnonzero(escalated).tolist():
        best = np.argsort(-p[row], kind="stable")[: min(CANDIDATES, len(task.labels))]
        sample_id = str(uuid.UUID(int=row))  # as long as a real one, and the gate's draw is the same in every report
        hint = Hint(label_ids=tuple(best.tolist()), probabilities=tuple(p[row, best].tolist()), confidence=float(confidence[row]))
        shown, probability = gate_hint(hint, run.threshold.hint, sample_id)
        message = cloud_pb2.PredictSample(
            sample_id=sample_id,
            purpose=int(Purpose.LIVE),  # type: ignore[arg-type]
            p_escalate=1.0,
            hint=None if shown is None else shown.to_proto(),
            payload=payload_to_proto(payloads[row]),
            small=scores_to_proto(predictions.logits[row], task.label_space),
            confidence=float(confidence[row]),
            bundle_id=_BUNDLE_ID,
            p_hint=probability,
        )
        sizes.append(message.ByteSize())
    return sizes
