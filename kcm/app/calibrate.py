"""`kcm calibrate`: which head routes, what the large model sees of the hint, and ε; with a promise where the labels support one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kcm.app.folders import writable
from kcm.app.progress import Steps, left_behind
from kcm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloud_server.models import LargeModel
    from kcm.app.samples import Labelled
    from kcm.calibration import Threshold
    from training.guarantee import Promise
    from training.run import Run

_FEW = 50  # labelled samples, of which an accuracy is uncertain by ± 14 points
_CURVE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_UNITS = {"pt": 0.01, "points": 0.01, "%": 0.01, "": 1.0}


def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `kcm train` or `kcm distill`.")],
    cloud_rate: Annotated[float | None, typer.Option("--cloud-rate", min=0.0, max=1.0, help="Share of samples that may go up.")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-accuracy-drop",
            metavar="0.5pt",
            help="Promise: accuracy at most this far below asking the large model always. Points (1pt) or a share (0.01).",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.9999, help="Of the promise.")] = 0.95,
    accuracy: Annotated[float | None, typer.Option("--accuracy", min=0.0, max=1.0, help="Accuracy to reach with the fewest calls.")] = None,
    below_large: Annotated[
        float | None,
        typer.Option("--below-large", min=0.0, max=1.0, help="The same, as a distance below the large model: 0.01 is a point."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", min=-1.0, max=1.0, help="This ε; the paper's is 0.98.")] = None,
    large: Annotated[Path | None, typer.Option("--large", help="Folder of the large model: for all that weighs its answers.")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Teacher store: truths that applications told count when the head is chosen.")
    ] = None,
    head: Annotated[
        str, typer.Option("--head", help="auto, or the head that routes: confidence, correctness, benefit, max-softmax.")
    ] = "auto",
    hint: Annotated[
        str, typer.Option("--hint", help="auto, or what the large model sees: none, candidates (several labels), assertion (one).")
    ] = "auto",
    no_hint: Annotated[
        float, typer.Option("--no-hint-share", min=0.0, max=0.5, help="Share without a hint, to measure its effect.")
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose ε for a budget of cloud calls, with a promise on accuracy, for an accuracy, or by hand; print what it costs, and the curve.

    A rate is read off samples that the small model hasn't seen: the task's stream, after a distillation round the tenth of it
    that is never distilled; without a stream the run's out-of-fold predictions. Accuracy needs labels that were kept back
    (calibration under [data]) and the large model's answers to them (--large). --max-accuracy-drop is a promise (learn then test) and
    is refused where the labels can't support it; --accuracy and --below-large are estimates.

    With --large and labels, the head that routes and the hint's gate are chosen first, on a selection split: the file that [data]
    names, else a third of the calibration file. ε never sees those samples. --store adds what Feedback told, weighted by 1/p_escalate.

    Try it: kcm calibrate runs/train/1 --cloud-rate 0.3
            kcm calibrate runs/train/1 --max-accuracy-drop 1pt --large large
    """
    from typing import get_args

    from cloud_server.models import load_large
    from kcm.app.models import load_small_kind, one_thread
    from kcm.app.samples import asked, labelled_splits, under_gate, unlabelled_scores, with_truths
    from kcm.calibration import Arm, HeadName
    from training.run import load_run, save_calibrated
    from training.select import choose
    from training.teacher_rows import parts_of

    if [cloud_rate, max_drop, accuracy, below_large, epsilon].count(None) != 4:
        raise ConfigError("choose one of --cloud-rate, --max-accuracy-drop, --accuracy, --below-large and --epsilon")
    drop = None if max_drop is None else parse_drop(max_drop)
    for name, value, known in (("--head", head, get_args(HeadName)), ("--hint", hint, get_args(Arm))):
        if value not in ("auto", *known):
            raise ConfigError(f"{name} {value!r} is unknown", fix=f"choose auto, {', '.join(known)}")
    one_thread()
    steps = Steps(quiet=as_json)
    loaded = load_run(run)
    writable(run)
    kind = load_small_kind(loaded.task, steps)
    if (drop is not None or accuracy is not None or below_large is not None) and large is None:
        raise ConfigError("accuracy is weighed against the large model's answers", fix="--large FOLDER (kcm train-large makes one)")
    if store is not None:
        parts_of(store)  # there is one: before the large model is asked
    with left_behind(f"{run} is as it was"):
        selection = labelled = model = None
        if large is not None:
            divided = head not in ("confidence", "max-softmax") or hint == "auto"
            chosen_on, kept_back = labelled_splits(loaded.task, divided=divided)
            if drop is not None:
                _check_support(len(kept_back), drop, confidence, taken=divided and not loaded.task.data.selection)
            model = load_large(large)
            selection, labelled = (asked(loaded, kind, model, split, steps) for split in (chosen_on, kept_back))
        samples = selection.selection if selection else None
        if store is not None:
            samples = with_truths(loaded, kind, store, samples, model.teacher_id if model else "", steps)
        router = choose(loaded.judge, head, samples, loaded.taught)
        loaded = replace(loaded, head=router.outcome, threshold=msgspec.structs.replace(loaded.threshold, head=router.choice))
        scores, source = unlabelled_scores(loaded, kind)

        def decide(labelled: Labelled | None) -> tuple[Threshold, Promise | None]:
            if labelled is not None and epsilon is None and cloud_rate is None:
                return _by_labels(loaded, labelled, scores, drop=drop, confidence=confidence, accuracy=accuracy, below=below_large)
            return _by_scores(loaded, scores, labelled, rate=cloud_rate, epsilon=epsilon), None

        threshold, promise = decide(labelled)
        gate = _with_gate(loaded, threshold, hint, no_hint, model, selection, steps).hint
        if labelled is not None and model is not None and model.reads_hints and gate.arm != "none":
            # What is promised is of the answers that devices will get: under this gate's hints.
            labelled = under_gate(loaded, labelled, gate, model, steps)
            threshold, promise = decide(labelled)
        if threshold.method in ("guarantee", "accuracy") and labelled is not None:
            source = f"{len(labelled.split)} labelled calibration samples"
        threshold = msgspec.structs.replace(threshold, hint=gate)
        threshold = _with_reference(loaded, threshold, scores, labelled, model)
    save_calibrated(run, replace(loaded, threshold=threshold, answered=labelled.answered if labelled else None))
    if as_json:
        typer.echo(json.dumps({**msgspec.to_builtins(threshold), "source": source, "curve": _curve(loaded, scores, labelled)}))
        return
    typer.echo(describe(threshold, source))
    if threshold.method == "accuracy" and threshold.samples < _FEW:
        typer.echo(f"warning: {threshold.samples} labelled samples say little of accuracies; {_FEW} or more are worth an ε", err=True)
    typer.echo(_table(_curve(loaded, scores, labelled), promise))
    typer.echo(f"{run / 'calibration.json'} written; next: kcm export {run} --out BUNDLE")


def parse_drop(text: str) -> float:
    """ "0.5pt", "0.5%" or "0.005" → 0.005.

    Raises:
        ConfigError: not such a number, or not between 0 and 1.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(pt|points|%|)\s*", text)
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else -1.0
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise ConfigError(f"--max-accuracy-drop {text!r} is no drop in accuracy", fix="--max-accuracy-drop 0.5pt   (or 0.005)")
    return value


def _check_support(samples: int, drop: float, confidence: float, *, taken: bool) -> None:
    """Raises DataError where so few samples can't promise it: before the large model is asked about each."""
    from training.guarantee import check_support

    with _taken(taken):
        check_support(samples, drop, confidence)


@contextmanager
def _taken(taken: bool) -> Iterator[None]:
    """Adds to the fix of a promise that isn't made, where the choice of head and hint took a part of its samples."""
    try:
        yield
    except DataError as error:
        if not taken:
            raise
        more = "; or --head confidence --hint candidates, which leave the selection samples to the promise"
        raise DataError(error.message, fix=f"{error.fix}{more}") from None


def _by_labels(
    run: Run,
    labelled: Labelled,
    scores: NDArray[np.float32],
    *,
    drop: float | None,
    confidence: float,
    accuracy: float | None,
    below: float | None,
) -> tuple[Threshold, Promise | None]:
    from training.calibrate import for_accuracy, for_promise
    from training.guarantee import promise, sequence

    score, small, big = run.score(labelled.predictions), labelled.small_right, labelled.large_right
    if drop is not None:
        with _taken(bool(run.threshold.head.samples) and not run.task.data.selection):
            made = promise(score, small, big, sequence(scores), max_drop=drop, confidence=confidence)
        return for_promise(score, small, big, made), made
    target = accuracy if accuracy is not None else float(big.mean()) - (below or 0.0)
    return for_accuracy(score, small, big, target), None


def _by_scores(run: Run, scores: NDArray[np.float32], labelled: Labelled | None, *, rate: float | None, epsilon: float | None) -> Threshold:
    """For a call rate or a given ε; with the accuracy that it has on labelled samples, where there are any."""
    from training.calibrate import fixed, for_rate, with_accuracy

    threshold = for_rate(scores, rate) if rate is not None else fixed(scores, epsilon or 0.0)
    if labelled is None:
        return threshold
    return with_accuracy(threshold, run.score(labelled.predictions), labelled.small_right, labelled.large_right)


def _with_gate(
    run: Run, threshold: Threshold, hint: str, no_hint: float, large: LargeModel | None, selection: Labelled | None, steps: Steps
) -> Threshold:
    from typing import get_args

    from kcm.calibration import Arm, HintGate

    if hint == "auto":
        if large is None or selection is None:
            gate = HintGate(reason="not fitted, so none is shown: that takes labels and the large model's answers")
        else:
            from kcm.app.hint import gate_for

            gate = gate_for(run, large, selection.split, selection.predictions, threshold.epsilon, steps, plain=selection.large)
    elif hint in get_args(Arm):
        gate = HintGate(arm=hint, reason="set by hand")  # type: ignore[arg-type]
    else:
        raise ConfigError(f"--hint {hint!r} is unknown", fix="--hint auto, none, candidates or assertion")
    return msgspec.structs.replace(threshold, hint=msgspec.structs.replace(gate, no_hint=no_hint))


def _with_reference(
    run: Run, threshold: Threshold, scores: NDArray[np.float32], labelled: Labelled | None, large: LargeModel | None
) -> Threshold:
    """The threshold with what the edge compares its traffic with, and the teacher that it was measured against."""
    from training.calibrate import reference

    head = run.threshold.head
    if labelled is None or large is None:
        return msgspec.structs.replace(threshold, head=head, reference=reference(scores, threshold.epsilon))
    found = reference(scores, threshold.epsilon, labelled.agree, run.score(labelled.predictions))
    return msgspec.structs.replace(threshold, head=head, reference=found, teacher_id=large.teacher_id, prompt_id=large.prompt_id)


def describe(threshold: Threshold, source: str) -> str:
    """What was chosen and what it is worth, a line each."""
    assert threshold.cloud_rate is not None and threshold.cloud_rate_interval is not None
    low, high = threshold.cloud_rate_interval
    lines = [f"ε = {threshold.epsilon:.4f}: {threshold.cloud_rate:.1%} cloud calls [{low:.1%}, {high:.1%}] on {source}"]
    if threshold.accuracy is not None and threshold.accuracy_interval is not None:
        low, high = threshold.accuracy_interval
        lines.append(f"accuracy there {threshold.accuracy:.1%} [{low:.1%}, {high:.1%}]")
    if promised := threshold.guarantee:
        lines.append(
            f"promised: at most {100 * promised.max_drop:g} points below the large model with {100 * promised.confidence:g}% confidence "
            f"(upper bound {100 * promised.upper:+.2f} points, effective n {promised.effective_n:.0f}; {promised.method})"
        )
    lines.append(f"head: {threshold.head.head} ({threshold.head.reason})")
    for name, found in threshold.head.evidence.items():
        low, high = found.interval
        lines.append(
            f"  {name:12} {found.accuracy:.1%} at 10–40 % calls, {100 * found.difference:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]"
        )
    lines.append(f"hint: {threshold.hint.arm} ({threshold.hint.reason}); {threshold.hint.no_hint:.0%} go without, to measure it")
    return "\n".join(lines)


def _curve(run: Run, scores: NDArray[np.float32], labelled: Labelled | None) -> dict[str, dict[str, Any]]:
    """Per call rate: ε, and on labelled samples the accuracy with its interval."""
    from kcm.policy import epsilon_for_rate
    from training.calibrate import fixed, with_accuracy

    curve: dict[str, dict[str, Any]] = {}
    for rate in _CURVE:
        epsilon = epsilon_for_rate(scores, rate)
        curve[str(rate)] = {"epsilon": epsilon}
        if labelled is not None:
            found = with_accuracy(fixed(scores, epsilon), run.score(labelled.predictions), labelled.small_right, labelled.large_right)
            curve[str(rate)] |= {"accuracy": found.accuracy, "accuracy_interval": found.accuracy_interval}
    return curve


def _table(curve: dict[str, dict[str, Any]], promise: Promise | None) -> str:
    lines = ["calls        ε   accuracy" if "accuracy" in curve["0.0"] else "calls        ε"]
    for rate, at in curve.items():
        line = f"{float(rate):5.0%}   {at['epsilon']:6.4f}"
        if "accuracy" in at:
            low, high = at["accuracy_interval"]
            line += f"   {at['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        lines.append(line)
    if promise is not None:
        from training.guarantee import shown

        _, calls, drop, p = promise.tested[-1]
        kept = len(promise.tested) - (p > 1 - promise.guarantee.confidence)
        last = f"{calls:.0%} calls, drop {100 * drop:+.2f} points, {shown(p)}"
        lines.append(f"tested {len(promise.tested)} thresholds from the safe end, {kept} hold; the last: {last}")
    return "\n".join(lines)
