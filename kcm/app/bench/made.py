"""A bundle for whoever has none: made-up words, of the size that a real text bundle has. Offline, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

SOURCE = "made-up sentences"
_LABELS, _ROWS = 60, 6  # rows a label
_VECTORS = 20_000  # words with a static vector: about what an encoder's tokenizer knows whole
_OWN, _SHARED = 8, 400  # words of one label alone; words of all
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def make_bundle(folder: Path, progress: Callable[[str], None]) -> Path:
    """Train on the made-up sentences and export to `folder`."""
    import numpy as np

    from export.bundle import export_bundle
    from kcm.preprocess import NgramPreprocessor
    from kcm.task import parse_task
    from training.data import Split
    from training.ngrams import WordVectors
    from training.program import train_run
    from training.small import Ngrams

    progress(f"no --bundle: training one on {_LABELS * _ROWS} {SOURCE}")
    draw = random.Random(0)
    words = _words(draw, _VECTORS)
    texts = _sentences(draw, words)
    labels = [f"intent {place:02}" for place in range(_LABELS)]
    task = parse_task({"task": {"id": "bench", "labels": labels}}, "task.toml")
    rows = NgramPreprocessor(task.preprocess)
    ids = np.unique([rows.word_bucket(word) for word in words])
    vectors = np.random.default_rng(0).normal(size=(len(ids), task.small.vector_size)).astype(np.float32)
    kind = Ngrams(task, lambda: WordVectors(ids, vectors))
    train = Split("train", texts, np.repeat(np.arange(_LABELS), _ROWS))
    run = train_run(task, kind, train, None, seed=0, progress=lambda _: None)
    progress("exporting it")
    export_bundle(run, folder, golden_payloads=texts)
    return folder


def _words(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}  # a set has another order in every process
    while len(found) < count:
        found["".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4)))] = None
    return list(found)


def _sentences(draw: random.Random, words: list[str]) -> list[str]:
    """Three words of the label's own among words of all."""
    shared = words[:_SHARED]
    texts = []
    for label in range(_LABELS):
        own = words[_SHARED + label * _OWN :][:_OWN]
        for _ in range(_ROWS):
            said = draw.sample(own, 3) + draw.choices(shared, k=draw.randint(6, 14))
            draw.shuffle(said)
            texts.append(" ".join(said))
    return texts
