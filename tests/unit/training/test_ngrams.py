"""The n-gram model: what the device computes is what was fitted, with and without word vectors, seen words or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kit import LABELS, WORDS, split

import training.linear
from kcm.assets import cache_dir
from kcm.preprocess import NgramPreprocessor
from kcm.task import PreprocessSpec, Task, load_task, parse_task
from training.data import Split, load_split
from training.evaluate import wilson
from training.fit import one_hot
from training.floor import TfidfLinear
from training.ngrams import NgramModel, WordVectors, distil_words, encode, fit_ngrams, joined
from training.program import labelled_examples
from training.small import Ngrams

SPEC = PreprocessSpec(buckets=2**12)
PREPROCESSOR = NgramPreprocessor(SPEC)


def vectors(size: int = 6) -> WordVectors:
    rng = np.random.default_rng(0)
    return distil_words([*WORDS, "stranger"], lambda words: rng.normal(size=(len(words), 8)).astype(np.float32), PREPROCESSOR, size)


def fitted(data: Split, words: WordVectors | None) -> NgramModel:
    x = encode(data.payloads, PREPROCESSOR)
    return fit_ngrams(x, one_hot(data.y, len(LABELS)), np.ones(len(data), np.float32), words)


def answer(model: NgramModel, *texts: str) -> tuple[np.ndarray, ...]:
    inputs = PREPROCESSOR.batch(texts)
    with torch.inference_mode():
        return tuple(part.numpy() for part in model(*map(torch.from_numpy, joined(inputs))))


@pytest.mark.parametrize("words", [None, vectors()], ids=["plain", "vectors"])
def test_the_devices_arithmetic_gives_what_training_optimised(words: WordVectors | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two codes compute features: sparse matrices in fitting, Gather and ReduceSum in the graph."""
    caught = {}

    def spy(sparse_x, dense_x, *args, **kwargs):  # type: ignore[no-untyped-def]
        solved = real(sparse_x, dense_x, *args, **kwargs)
        caught["logits"] = sparse_x @ solved[0] + (dense_x @ solved[1] if dense_x is not None else 0)
        return solved

    real = training.linear.fit_softmax
    monkeypatch.setattr("training.ngrams.fit_softmax", spy)
    data = split(80)
    model = fitted(data, words)
    logits, _, _ = answer(model, *data.payloads)
    assert np.abs(logits).max() > 1
    assert logits == pytest.approx(caught["logits"], abs=2e-4 * float(np.abs(logits).max()))
    assert (logits.argmax(1) == data.y).mean() > 0.9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_text_gives_finite_numbers_alone_and_in_a_batch(batch: list[str]) -> None:
    together = answer(MODEL, *batch)
    assert all(np.isfinite(part).all() for part in together)
    for row, text in enumerate(batch):
        for whole, alone in zip(together, answer(MODEL, text), strict=True):
            assert whole[row] == pytest.approx(alone[0], abs=1e-4)
    assert ((together[2] >= 0) & (together[2] <= 1)).all()


MODEL = fitted(split(60), vectors())


@pytest.mark.parametrize("words", [None, vectors()], ids=["plain", "vectors"])
def test_unseen_words_and_no_words(words: WordVectors | None) -> None:
    model = fitted(split(60), words)
    logits, length, unknown = answer(model, "qqq vvv", "", "oil", "oil qqq", "stranger")
    assert length.tolist() == [2, 0, 1, 2, 1]
    # "stranger" was in no training text, but has a word vector.
    assert unknown.tolist() == [1, 0, 0, 0.5, 0 if words else 1]
    assert np.isfinite(logits).all()
    assert logits[2].argmax() == LABELS.index("oil")
    if words is None:
        assert logits[0] == pytest.approx(np.zeros(len(LABELS)), abs=1e-5), "words that were never seen must say nothing"


def test_word_vectors_carry_a_label_to_words_that_training_never_showed() -> None:
    near = {"oil": 0, "petroleum": 0, "steel": 1, "iron": 1, "profit": 2, "earnings": 2}
    basis = np.eye(3, dtype=np.float32)
    words = distil_words(list(near), lambda ws: np.stack([basis[near[w]] for w in ws]), PREPROCESSOR, 2)
    logits, _, unknown = answer(fitted(split(60), words), "petroleum", "iron", "earnings")
    assert logits.argmax(1).tolist() == [0, 1, 2]
    assert unknown.tolist() == [0, 0, 0]


def test_word_vectors_keep_the_strongest_directions_and_one_row_a_bucket() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(len(WORDS), 5)).astype(np.float32) * np.array([10, 5, 1e-3, 1e-3, 1e-3], np.float32)
    made = distil_words(WORDS, lambda _: spread, PREPROCESSOR, 2)
    centred = spread - spread.mean(0)
    distances = np.linalg.norm(centred[:, None] - centred[None], axis=2)
    kept = np.linalg.norm(made.vectors[:, None] - made.vectors[None], axis=2)
    assert kept == pytest.approx(distances, abs=0.02)
    assert made.ids.tolist() == [PREPROCESSOR.word_bucket(word) for word in WORDS]
    tiny = distil_words(WORDS, lambda ws: spread[: len(ws)], NgramPreprocessor(PreprocessSpec(buckets=4)), 2)
    assert len(set(tiny.ids.tolist())) == len(tiny.ids) <= 4


def test_a_prediction_does_not_depend_on_how_rows_were_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    task = parse_task({"task": {"id": "t", "labels": list(LABELS)}, "preprocess": {"buckets": SPEC.buckets}}, "t")
    kind, texts = Ngrams(task, None), [*split(40).payloads, "", "oil " * 30]
    whole = kind.predict(MODEL, kind.featurise(texts))
    assert whole.logits == pytest.approx(answer(MODEL, *texts)[0], abs=1e-5)
    monkeypatch.setattr("training.small._CELLS", 1)  # one row a batch
    single = kind.predict(MODEL, kind.featurise(texts))
    assert single.logits == pytest.approx(whole.logits, abs=1e-5)
    assert single.length.tolist() == whole.length.tolist()


def test_word_vectors_are_asked_for_by_the_first_fit_alone() -> None:
    """Predicting with a run that is there must not need the encoder that once gave it its vectors."""
    task = parse_task({"task": {"id": "t", "labels": list(LABELS)}, "preprocess": {"buckets": SPEC.buckets}}, "t")
    asked: list[int] = []

    def make() -> WordVectors:
        asked.append(1)
        return vectors()

    kind = Ngrams(task, make)
    kind.predict(MODEL, kind.featurise(["oil"]))
    assert not asked
    for _ in range(2):
        assert len(kind.fit(labelled_examples(task, kind, split(40))).vectors) > 1
    assert len(asked) == 1


def real_task(name: str) -> Task:
    folder = cache_dir() / "tasks" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not fetched: kcm fetch {name}")
    return load_task(folder)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["r52", "20newsgroups"])
def test_without_vectors_the_model_is_not_below_tf_idf_at_eight_labels_a_class(name: str) -> None:
    task = real_task(name)
    train, test = load_split(task, "train"), load_split(task, "test")
    test = test.take(np.random.default_rng(0).permutation(len(test))[:1500])
    kind = Ngrams(task, None)
    ours = kind.predict(kind.fit(labelled_examples(task, kind, train)), kind.featurise(test.payloads)).logits.argmax(1)
    floor = TfidfLinear(train.payloads, train.y, len(task.labels)).probabilities(test.payloads).argmax(1)
    right = int((ours == test.y).sum())
    low, _ = wilson(int((floor == test.y).sum()), len(test))
    assert right / len(test) > low, f"{right / len(test):.3f}, floor {(floor == test.y).mean():.3f}"
