"""Does the promise hold? 1,000 calibrations on resamples of real outcomes; how often is the true drop above the promised one?

    python -m benchmarks.coverage [--task r52] [--samples 800] [--drop 0.01] [--confidence 0.95] [--resamples 1000]

The population is the task's test file with the answers of a small and a large model to it. Each calibration draws its samples from
it with replacement, so the true drop at any ε is known exactly. Beside the promise: ε at which the drop on the calibration sample is
just at most the promised one, which is what a threshold without a guarantee does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kcm.app.models import LargeInProcess, load_small_kind, one_thread
from kcm.app.progress import Steps
from kcm.assets import task_path
from kcm.errors import DataError
from kcm.policy import epsilon_for_accuracy
from kcm.task import load_task
from training.data import load_split
from training.evaluate import wilson
from training.guarantee import counts, promise, sequence
from training.program import train_run

Bool = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="r52")
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--drop", type=float, default=0.01)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=0, help="of the test file; 0: all")
    arguments = parser.parse_args()
    one_thread()
    steps = Steps()
    score, small, large, thresholds = population(arguments.task, arguments.documents, steps)
    print(
        f"{arguments.task}: population of {len(score)}, small model {small.mean():.1%}, large {large.mean():.1%}; promised: at most "
        f"{100 * arguments.drop:g} points below, {arguments.confidence:.0%} confidence; {arguments.samples} labelled samples a calibration"
    )

    def true_drop(epsilon: float) -> float:
        losses, gains = counts(score, small, large, epsilon)
        return (losses - gains) / len(score)

    rng = np.random.default_rng(0)
    refused, promised, estimated, calls = 0, [], [], []
    for number in range(arguments.resamples):
        if number % 100 == 0:
            steps(f"{number} of {arguments.resamples} resamples")
        drawn = rng.integers(len(score), size=arguments.samples)
        part = score[drawn], small[drawn], large[drawn]
        try:
            epsilon = promise(*part, thresholds, max_drop=arguments.drop, confidence=arguments.confidence).epsilon
            promised.append(true_drop(epsilon))
            calls.append(float((score <= epsilon).mean()))
        except DataError:
            refused += 1
        plain = epsilon_for_accuracy(*part, float(part[2].mean()) - arguments.drop)
        estimated.append(true_drop(1.0 if plain is None else plain))
    for name, drops in (("promise", promised), ("no guarantee", estimated)):
        # A refusal promises nothing, so it can't be broken: it counts as kept.
        broken = sum(drop > arguments.drop + 1e-12 for drop in drops)
        low, high = wilson(broken, arguments.resamples)
        share = f"{broken / arguments.resamples:6.1%} [{low:.1%}, {high:.1%}]"
        print(f"{name:13} broken {share}   mean true drop {100 * np.mean(drops or [0]):+.2f} points")
    oracle = next(e for e in [*reversed(thresholds)] if true_drop(e) <= arguments.drop)
    print(
        f"refused {refused} of {arguments.resamples}; calls where promised: mean {np.mean(calls or [1]):.1%}, "
        f"sd {np.std(calls or [1]):.1%}; knowing the population {(score <= oracle).mean():.1%} would do"
    )


def population(name: str, documents: int, steps: Steps) -> tuple[NDArray[np.float32], Bool, Bool, list[float]]:
    """(C_x, small right, large right) [N] of the test file, and thresholds laid on the stream's scores."""
    task = load_task(task_path(name))
    test = load_split(task, "test")
    if documents:
        test = test.take(list(range(documents)))
    kind = load_small_kind(task, steps)
    run = train_run(task, kind, load_split(task, "train"), None, seed=0, progress=steps)
    with tempfile.TemporaryDirectory() as scratch:
        large = LargeInProcess(task, Path(scratch), load_split(task, "large_train"), steps).logits(test.payloads)
    predictions = kind.predict(run.small, kind.featurise(test.payloads))
    stream = kind.predict(run.small, kind.featurise(load_split(task, "stream").payloads[:2000]))
    right = predictions.logits.argmax(1) == test.y
    return run.judge.confidence(predictions), right, large.argmax(1) == test.y, sequence(run.judge.confidence(stream))


if __name__ == "__main__":
    main()
