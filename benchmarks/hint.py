"""Does the hint help the large encoder? Accuracy with and without it, where the small model was right and where it was wrong.

    python -m benchmarks.hint [--task r52] [--documents 300] [--dropout 0.3]

The head is fitted on large_train with hint dropout; hints are the small model's five candidates, fitted on the edge's labels.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from cloud_server.models import load_large
from export.bundle import CANDIDATES
from kcm.app.models import LargeInProcess, load_small_kind, one_thread
from kcm.app.progress import Steps
from kcm.assets import task_path
from kcm.sample import Hint
from kcm.task import load_task
from training.data import load_split
from training.evaluate import paired_interval
from training.fit import softmax
from training.program import train_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="r52")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--dropout", type=float, default=0.3)
    arguments = parser.parse_args()
    one_thread()
    steps = Steps()
    task = load_task(task_path(arguments.task))
    task = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, hint_dropout=arguments.dropout))
    test = load_split(task, "test").take(list(range(arguments.documents)))
    kind = load_small_kind(task, steps)
    run = train_run(task, kind, load_split(task, "train"), None, seed=0, progress=steps)
    with tempfile.TemporaryDirectory() as scratch:
        LargeInProcess(task, Path(scratch), load_split(task, "large_train"), steps)
        large = load_large(Path(scratch))
    predictions = kind.predict(run.small, kind.featurise(test.texts))
    p, confidence = softmax(predictions.logits), run.judge.confidence(predictions)
    best = np.argsort(-p, axis=1, kind="stable")[:, :CANDIDATES]
    hints = [
        Hint(label_ids=tuple(ids), probabilities=tuple(map(float, p[row, ids])), confidence=float(confidence[row]))
        for row, ids in enumerate(best.tolist())
    ]
    small = best[:, 0] == test.y
    plain = large.logits(test.texts, [None] * len(test)).argmax(1) == test.y
    hinted = large.logits(test.texts, hints).argmax(1) == test.y
    print(f"{task.id}: {len(test)} documents, small model {small.mean():.1%}, hint dropout {arguments.dropout}")
    for name, rows in (("all", small | True), ("small model right", small), ("small model wrong", ~small)):
        mean, low, high = paired_interval(hinted[rows].astype(float) - plain[rows])
        change = f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        print(f"{name:20} {rows.sum():5}   no hint {plain[rows].mean():6.1%}   hint {hinted[rows].mean():6.1%}   {change}")


if __name__ == "__main__":
    main()
