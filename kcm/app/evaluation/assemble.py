"""One evaluation from beginning to end: asks both models, runs the protocol, and says what the figures rest on.

eval.json, schema 1. A FIGURE is {mean, sd, low, high, values}: sd over several runs (for "random" over its draws), low and high the
95 % interval of a single one, values how many were defined; what is undefined is null. Shares and accuracies are 0..1.

kcm_version, command, task, labels, judge, small, head, length_escalates, cost, seconds, warnings
runs[]             folder, seed, round, fitted_on, epsilon (how, for which target), head, what call rates are read off and how many,
                   calibrated_with and learnt_from (teacher ids of large models, "" where none was asked)
large, samples     the large model's folder and ids; test and labelled calibration samples
systems{name}      kcm, its equal-size twin (mlp or kan), tempered, max-softmax, entropy, margin, length, random, oracle; and
                   "confidence" (C_x) where another head routes
  apgr, apgr_exact, cpt50, cpt80, cpt95, aurc, auroc, ece, brier      FIGUREs
  targets[]        target, epsilon, calls, accuracy, accuracy_at_exact_calls (FIGUREs), expected_accuracy, cost_per_1000
  curve            rate[101], accuracy[101], low, high (± sd over runs, of one run the interval)
  risk_coverage    coverage[100], risk[100]
  reliability[]    claimed, right, low, high, samples; null where the score claims no probability
references         always-small, always-large: accuracy (FIGURE), calls, cost_per_1000
paired{name}       per call rate {calibrated, exact}: ours minus the system in accuracy, {mean, low, high}
operating_point    at the run's own ε: epsilon, target_calls, accuracy, calls (FIGUREs), cost_per_1000
groups             counted_in, target, rows{many, medium, few}: classes, samples, accuracy{small, large, at_epsilon, kcm, tempered}
recall{system}     of a retrieval task (else null): small, large, at_epsilon, each {"1", "5", "10"}: FIGUREs
classes[]          where only the large model is right: label, counts (means over runs), what the small model says there
latency            machine; local, cloud: p50_ms, p99_ms, samples, measured_on, milliseconds[]; degraded is null: not measured
bytes_up           p50_per_sample, mean_per_sample, per_1000_requests, samples (messages)
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.app.evaluation.measure import (
    Evaluated,
    Features,
    Large,
    evaluate_run,
    labelled_split,
    local_latency,
    machine,
    message_sizes,
)
from kcm.app.models import load_small_kind
from kcm.app.progress import Steps
from kcm.task import Task
from training.data import Split, identity, load_split
from training.evaluate import wilson
from training.groups import by_group, frequency_groups, rescued
from training.protocol import OURS, SCHEMA, SEEDS, at_target, measure, spread
from training.retrieval.recall import AT as RECALL_AT
from training.retrieval.recall import rank_of_truth
from training.run import Run

Json = dict[str, Any]
Float = NDArray[np.floating]
Bool = NDArray[np.bool_]

GROUP_RATE = 0.3  # call rate at which ours and tempered max-softmax are compared per group
_FEW_CALIBRATION, _FEW_TEST = 500, 300  # below them the report warns


def assemble(folders: Sequence[Path], runs: Sequence[Run], large_folder: Path, steps: Steps) -> Json:
    """The whole of eval.json.

    Raises:
        ConfigError: the large model isn't one, or answers with other labels.
        DataError: the task has no test split, or it is empty or has no labels.
    """
    task = runs[0].task
    test = load_split(task, "test")
    kind = load_small_kind(task, steps)
    large = Large(large_folder, task, steps)
    answers = large.answers(test)
    large_right = answers.argmax(1) == test.y
    kept = labelled_split(task)
    labelled = None if kept is None else (kept, large.right(kept))
    features = Features(kind)
    done = []
    for folder, run in zip(folders, runs, strict=True):
        steps(f"{folder}: scores of every system")
        done.append(evaluate_run(folder, run, features, test, large_right, labelled))
    steps("figures, bootstrap")
    first = done[0]
    sizes = [message_sizes(e.run, e.test, test.payloads, e.score <= e.run.threshold.epsilon) for e in done]
    result: Json = {
        "schema": SCHEMA,
        "kcm_version": version("kcm"),
        "command": shlex.join(["kcm", *sys.argv[1:]]),
        "task": task.id,
        "labels": len(task.labels),
        "judge": first.run.judge.spec.kind,
        "head": first.run.threshold.head.head,
        "small": task.small.kind,
        "length_escalates": "long" if first.longer_escalates else "short",
        "runs": [_run(e) for e in done],
        "large": {
            "folder": str(large_folder),
            "kind": task.large.kind,
            "teacher_id": large.model.teacher_id,
            "prompt_id": large.model.prompt_id,
        },
        "samples": {"test": len(test), "labelled_calibration": 0 if labelled is None else len(labelled[0])},
        "cost": {"cloud_call": task.cost.cloud_call, "local_call": task.cost.local_call},
        **measure([e.trial for e in done], task.cost),
        "operating_point": _operating_point(done, task),
        "groups": _groups(done, task, test, large_right),
        "classes": _classes(done, test, large_right),
        "recall": _recall(done, test, answers) if task.gallery.file else None,
        "bytes_up": _bytes_up(sizes, len(test)),
    }
    steps("latency")
    result["latency"] = _latency(done[0], kind, large, test)
    result["warnings"] = _warnings(done, test, large, result)
    result["seconds"] = round(steps.seconds, 1)
    return result


def _run(e: Evaluated) -> Json:
    source, samples = e.calibration
    threshold = e.run.threshold
    return {
        "folder": str(e.folder),
        "seed": e.run.info.seed,
        "round": e.run.info.round,
        "kcm_version": e.run.info.kcm_version,
        "fitted_on": len(e.run.payloads),
        "fitted_on_labels": int(e.run.labelled.sum()),
        "epsilon": threshold.epsilon,
        "epsilon_by": threshold.method,
        "epsilon_target": threshold.target,
        "head": threshold.head.head,
        "calibrated_on": source,
        "calibration_samples": samples,
        "calibrated_with": threshold.teacher_id,
        "learnt_from": e.run.info.teacher_id,
    }


def _at_epsilon(e: Evaluated) -> tuple[Bool, Bool]:
    """(right, escalated), each [N], at the run's own ε."""
    escalated = np.asarray(e.score <= e.run.threshold.epsilon)
    return np.where(escalated, e.trial.large_right, e.trial.small_right), escalated


def _operating_point(done: Sequence[Evaluated], task: Task) -> Json:
    outcomes = [_at_epsilon(e) for e in done]
    accuracy, calls = (spread([float(o[i].mean()) for o in outcomes]) for i in (0, 1))
    if len(done) == 1:
        for found, hits in zip((accuracy, calls), outcomes[0], strict=True):
            found["low"], found["high"] = wilson(int(hits.sum()), hits.size)
    return {
        "epsilon": spread([e.run.threshold.epsilon for e in done]),
        "target_calls": spread([e.run.threshold.target for e in done if e.run.threshold.method == "cloud-rate"]),
        "accuracy": accuracy,
        "calls": calls,
        "cost_per_1000": 1000 * (task.cost.local_call + calls["mean"] * task.cost.cloud_call),
    }


def _groups(done: Sequence[Evaluated], task: Task, test: Split, large_right: Bool) -> Json:
    source = "large_train" if task.data.large_train and not task.gallery.file else "train"
    groups = frequency_groups(np.bincount(load_split(task, source).y, minlength=len(task.labels)))
    columns: dict[str, Float] = {
        "small": np.mean([e.trial.small_right for e in done], 0),
        "large": large_right.astype(np.float64),
        "at_epsilon": np.mean([_at_epsilon(e)[0] for e in done], 0),
        OURS: np.mean([at_target(e.trial, OURS, GROUP_RATE)[0] for e in done], 0),
        "tempered": np.mean([at_target(e.trial, "tempered", GROUP_RATE)[0] for e in done], 0),
    }
    return {"counted_in": source, "target": GROUP_RATE, "rows": by_group(groups, test.y, columns)}


def _recall(done: Sequence[Evaluated], test: Split, answers: Float) -> Json:
    """Of a retrieval task: R@k of either model, and at each run's own ε, where a query has the whole list of whoever answers it."""
    large = rank_of_truth(answers.astype(np.float32), test.y)
    places: dict[str, list[Any]] = {"small": [], "large": [large], "at_epsilon": []}
    for e in done:
        small = rank_of_truth(e.test.logits, test.y)
        places["small"].append(small)
        places["at_epsilon"].append(np.where(_at_epsilon(e)[1], large, small))
    return {name: {str(k): spread([float((one < k).mean()) for one in found]) for k in RECALL_AT} for name, found in places.items()}


def _classes(done: Sequence[Evaluated], test: Split, large_right: Bool) -> list[Json]:
    answers = np.stack([e.test.logits.argmax(1) for e in done])
    escalated = np.stack([_at_epsilon(e)[1] for e in done])
    return rescued(answers, test.y, large_right, escalated, done[0].run.task.labels)


def _bytes_up(sizes: Sequence[Sequence[int]], requests: int) -> Json:
    """Serialised PredictSample messages, without gRPC's and TLS's own framing."""
    every = [size for one in sizes for size in one]
    return {
        "samples": len(every),
        "p50_per_sample": float(np.median(every)) if every else None,
        "mean_per_sample": float(np.mean(every)) if every else None,
        "per_1000_requests": 1000 * sum(every) / (requests * len(sizes)),
    }


def _latency(e: Evaluated, kind: Any, large: Large, test: Split) -> Json:
    milliseconds, what = local_latency(e.run, kind, test.payloads)
    return {
        "machine": machine(),
        "local": _percentiles(milliseconds, what),
        "cloud": _percentiles(large.latency(test.payloads), "the large model in this process: no network, no batching"),
        "degraded": None,
        "degraded_note": "not measured: a degraded answer is the local one, given when the cloud's deadline has passed",
    }


def _percentiles(milliseconds: list[float], measured_on: str) -> Json:
    p50, p99 = np.percentile(milliseconds, [50, 99]).tolist()
    rounded = [round(value, 4) for value in milliseconds]
    return {"p50_ms": p50, "p99_ms": p99, "samples": len(milliseconds), "measured_on": measured_on, "milliseconds": rounded}


def _other_teachers(done: Sequence[Evaluated], large: Large) -> list[str]:
    """Where the large model that is asked here isn't the one that the runs know."""
    found, here = [], large.model.teacher_id
    if others := sorted({e.run.threshold.teacher_id for e in done} - {"", here}):
        promised = "; the promise on accuracy doesn't hold for this one" if any(e.run.threshold.guarantee for e in done) else ""
        fix = "kcm calibrate RUN --large FOLDER of this one, or evaluate with the other"
        found.append(f"the large model here is {here}, ε was calibrated with {', '.join(others)}{promised}: {fix}")
    elif prompts := sorted({e.run.threshold.prompt_id for e in done if e.run.threshold.teacher_id} - {"", large.model.prompt_id}):
        found.append(f"the large model reads prompt {large.model.prompt_id} here, ε was calibrated with {', '.join(prompts)}")
    if others := sorted({e.run.info.teacher_id for e in done} - {"", here}):
        found.append(f"the large model here is {here}, the small model learnt from {', '.join(others)}")
    return found


def _warnings(done: Sequence[Evaluated], test: Split, large: Large, result: Json) -> list[str]:
    """What a reader should know before trusting a figure."""
    task, found = done[0].run.task, []
    if len(done) < SEEDS:
        spread_over = "bootstrap intervals over test samples alone" if len(done) == 1 else f"mean ± sd over {len(done)} runs"
        found.append(f"{len(done)} run(s): the protocol is at least {SEEDS} seeds; figures are {spread_over}")
    if len({e.run.info.seed for e in done}) < len(done):
        found.append("two runs have the same seed: the spread over runs is too small")
    if len(done) > 1 and all(np.array_equal(e.test.logits, done[0].test.logits) for e in done):
        found.append(
            "the small model is the same in all runs: the spread over them is the judge's alone, not that of other training labels"
        )
    source, samples = min((e.calibration for e in done), key=lambda c: c[1])
    if source.startswith("out-of-fold"):
        found.append("the task names no stream (or none of it is fresh): call rates are read off out-of-fold predictions of training texts")
    if samples < _FEW_CALIBRATION:
        off = 98 / samples**0.5
        found.append(f"only {samples} calibration samples: a rate that is read off them may be {off:.0f} points off (95 %, at 50 % calls)")
    if len(test) < _FEW_TEST:
        found.append(f"only {len(test)} test samples: an accuracy is known to about ±{98 / len(test) ** 0.5:.0f} points")
    absent = np.flatnonzero(np.bincount(test.y, minlength=len(task.labels)) == 0)
    if len(absent):
        named = ", ".join(task.labels[i] for i in absent[:5]) + (", …" if len(absent) > 5 else "")
        found.append(f"{len(absent)} of {len(task.labels)} labels never occur in the test split ({named}): nothing is known about them")
    seen = set(map(identity, done[0].run.payloads))
    known = sum(identity(payload) in seen for payload in test.payloads)
    if known:
        found.append(f"{known} test texts are also texts that the run was fitted on: its figures are too good")
    if any(e.run.threshold.method == "fixed" for e in done):
        found.append("a run's ε was set by hand, not calibrated: kcm calibrate RUN --cloud-rate 0.3")
    found += _other_teachers(done, large)
    small, strong = result["references"]["always-small"]["accuracy"]["mean"], result["references"]["always-large"]["accuracy"]["mean"]
    if result["systems"][OURS]["apgr"]["values"] < len(done):
        found.append(
            f"the large model ({100 * strong:.1f} %) is not better than the small one ({100 * small:.1f} %): APGR and CPT are undefined"
        )
    if result["systems"][OURS]["auroc"]["values"] < len(done):
        found.append("the small model is right (or wrong) on every test sample: AUROC is undefined")
    if large.model.reads_hints and done[0].run.threshold.hint.arm != "none":
        found.append("the large model reads hints, but is asked here without: answers with a hint may differ")
    return found
