"""What a decision on the device costs, against bare parts of the same run, interleaved.

    python -m benchmarks.hot_path [--task r52] [--repeats 15] [--json]

encode: a 20-word sentence → ids, with warm and with cold word caches; its peer is scikit-learn's HashingVectorizer on the same
words and n-grams. run: one session.run of the fused graph at batch 1. infer: EdgeRuntime.infer, preprocessing and policy
included. Medians over repeats with the middle half's range; ratios per repeat, so that a busy machine moves both sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_runtime import EdgeRuntime
from export.bundle import export_bundle
from export.session import Session
from kcm.app.models import load_small_kind, one_thread
from kcm.app.progress import Steps
from kcm.assets import task_path
from kcm.preprocess import NgramPreprocessor
from kcm.sample import Sample
from kcm.task import load_task
from training.data import load_split
from training.program import train_run

SENTENCE = "the bank said it would raise its lending rate by half a point to nine per cent from next monday"
CALLS = 200


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls * 1e6


def measure(task_name: str, repeats: int) -> dict[str, list[float]]:
    """µs per call, by name, one entry a repeat."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.pipeline import make_union

    task = load_task(task_path(task_name))
    steps = Steps()
    run = train_run(task, load_small_kind(task, steps), load_split(task, "train"), None, seed=0, progress=steps)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export_bundle(run, bundle, golden_texts=run.texts)
        edge = EdgeRuntime.load(bundle)
        session = Session((bundle / "models" / "fp32.onnx").read_bytes())
    warm, cold = NgramPreprocessor(task.preprocess), NgramPreprocessor(task.preprocess)
    inputs, sample = warm.batch([SENTENCE]), Sample(payload=SENTENCE, sample_id="a")
    peer = make_union(
        HashingVectorizer(ngram_range=(1, 2), n_features=2**18, norm=None),
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**18, norm=None),
    )

    def encode_cold() -> None:
        cold._words.clear()
        cold.encode(SENTENCE)

    calls: dict[str, Callable[[], object]] = {
        "encode_warm": lambda: warm.encode(SENTENCE),
        "encode_cold": encode_cold,
        "encode_sklearn": lambda: peer.transform([SENTENCE]),
        "run": lambda: session.run(inputs),
        "infer": lambda: edge.infer([sample]),
    }
    for call in calls.values():
        microseconds(call, 50)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(microseconds(call))
    return taken


def described(values: np.ndarray) -> dict[str, float]:  # type: ignore[type-arg]
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="r52")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    one_thread()
    taken = {name: np.array(values) for name, values in measure(arguments.task, arguments.repeats).items()}
    result = {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "words": len(SENTENCE.split()),
        "us": {name: described(values) for name, values in taken.items()},
        "ratios": {
            "sklearn_over_encode_warm": described(taken["encode_sklearn"] / taken["encode_warm"]),
            "text_decision_over_run": described(taken["infer"] / taken["run"]),
        },
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['machine']}, {result['date']}, {result['words']} words, {arguments.repeats} repeats of {CALLS} calls")
    for group in ("us", "ratios"):
        for name, value in result[group].items():  # type: ignore[attr-defined]
            print(f"{name:28} {value['median']:8.1f}  [{value['low']:.1f}, {value['high']:.1f}]" + (" µs" if group == "us" else "×"))


if __name__ == "__main__":
    main()
