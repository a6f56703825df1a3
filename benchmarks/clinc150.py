"""The closed loop on CLINC150, five label draws: edge labels 5 a class inside the large model's 50; the stream is the other 7,500.

    python -m benchmarks.clinc150 --data clinc150_dev.json [--seeds 5] [--rounds 5] [--out FILE.json]

The labels of the stream are withheld, and the large model never saw the stream. The validation split is the test; 300 labelled texts
taken off the stream's end, which nobody else sees, choose the head that routes. The out-of-scope queries ought to escalate. Beside KCM:
TF-IDF + linear + max-softmax with the same chunks, budget and reserve; temperature-scaled max-softmax and the equal-parameter
judge on KCM's own small model. Each seed draws labels, stream order and folds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kcm.app.models import load_small_kind, one_thread
from kcm.app.progress import Steps
from kcm.app.simulate import table
from kcm.assets import model_path
from kcm.task import Task
from training.data import Split
from training.large_head import fit_head
from training.simulate import Setting, simulate_seed, summarise

Rows = Sequence[Sequence[str]]
EDGE, LARGE = 5, 50  # labels a class
SELECTION = 2  # labels a class, to choose the head by


def draw(rows: Rows, labels: dict[str, int], seed: int) -> tuple[Split, Split, Split, Split]:
    """(train, large_train, stream, selection) of one seed."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, label in shuffled:
        by_label[label].append(text)

    def split(name: str, start: int, end: int | None) -> Split:
        chosen = [(text, labels[label]) for label in labels for text in by_label[label][start:end]]
        return Split(name, [text for text, _ in chosen], np.array([label for _, label in chosen], np.int64))

    stream = split("stream", LARGE, -SELECTION)
    unlabelled = Split("stream", stream.payloads, None)
    return split("train", 0, EDGE), split("large_train", 0, LARGE), unlabelled, split("selection", -SELECTION, None)


def main() -> None:
    from cloud_server.models.encoder import Encoder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    one_thread()
    steps = Steps()
    data = json.loads(arguments.data.read_text())
    labels = {label: i for i, label in enumerate(sorted({label for _, label in data["train"]}))}
    test = Split("test", [text for text, _ in data["val"]], np.array([labels[label] for _, label in data["val"]], np.int64))
    task = Task(id="clinc150", labels=tuple(labels))
    kind = load_small_kind(task, steps)
    encoder = Encoder(model_path("minilm"), task.large.max_tokens)
    steps("embeddings of all texts, once")
    texts = list(dict.fromkeys([text for text, _ in data["train"]] + test.payloads))
    known = dict(zip(texts, encoder.embed(texts), strict=True))

    results = []
    for seed in range(arguments.seeds):
        train, large_train, stream, selection = draw(data["train"], labels, seed)
        head = fit_head(np.stack([known[t] for t in large_train.payloads]), large_train.y, len(labels))

        def teacher(asked: list[str], head=head) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
            return head.logits(np.stack([known[t] for t in asked]))

        setting = Setting(
            task=task,
            kind=kind,
            train=train,
            stream=stream,
            test=test,
            teacher=teacher,
            large_test=teacher(test.payloads),
            rounds=arguments.rounds,
            share=0.5,
            selection=selection,
            outside=tuple(text for text, _ in data["oos_val"]),
        )
        results.append(simulate_seed(setting, seed, lambda text, seed=seed: steps(f"seed {seed}: {text}")))  # type: ignore[misc]
        summary = {**summarise(results), "task": task.id, "seconds": steps.seconds}
        if arguments.out:
            arguments.out.write_text(json.dumps(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
