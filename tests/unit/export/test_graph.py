"""The fused graph is the torch model: logits, C_x and candidates, for every judge, batch and length."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kit import LABELS, WORDS, split

from export.graph import fuse_ngrams
from export.session import Session
from kcm.preprocess import NgramPreprocessor
from kcm.task import JudgeSpec, PreprocessSpec
from training.fit import one_hot, softmax
from training.judge import Judge, Predictions, fit_judge
from training.ngrams import NgramModel, distil_words, encode, fit_ngrams, joined
from training.select import Router, Selection, choose

PREPROCESSOR = NgramPreprocessor(PreprocessSpec(buckets=2**10))
JUDGES = {
    "kan": JudgeSpec(ranks=3),
    "kan k=1": JudgeSpec(ranks=1),
    "kan degree 1": JudgeSpec(ranks=3, degree=1),
    "kan hidden": JudgeSpec(ranks=2, hidden=4, grid=3),
    "kan grid 8": JudgeSpec(ranks=3, grid=8),
    "mlp": JudgeSpec(kind="mlp", ranks=3),
    "mlp k=1": JudgeSpec(kind="mlp", ranks=1),
}
# What every runtime here knows: no control flow, no sequences, nothing whose output shape depends on values.
PLAIN = {
    "Add",
    "And",
    "Cast",
    "Clip",
    "Concat",
    "Div",
    "Equal",
    "Exp",
    "Gather",
    "Gemm",
    "Greater",
    "Identity",
    "Less",
    "Log",
    "LogSoftmax",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "ReduceL2",
    "ReduceMax",
    "ReduceSum",
    "Relu",
    "Sign",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "TopK",
    "Unsqueeze",
    "Where",
}


@cache
def models(judge: str, vectors: bool) -> tuple[NgramModel, Judge]:
    data, fresh = split(150), split(500, seed=1)
    rng = np.random.default_rng(1)
    words = distil_words([*WORDS, "zyx"], lambda ws: rng.normal(size=(len(ws), 8)).astype(np.float32), PREPROCESSOR, 6) if vectors else None
    known = [text.replace("zyx", "").replace("wvu", "") for text in data.payloads]
    small = fit_ngrams(encode(known, PREPROCESSOR), one_hot(data.y, len(LABELS)), np.ones(len(data), np.float32), words)
    # Long texts, and such with unknown words, are labelled at random: the judge has something to say that the logits don't.
    predictions = predict(small, fresh.payloads)
    odd = (predictions.length > 8) | (predictions.unknown > 0)
    labels = np.where(odd, rng.integers(0, len(LABELS), len(fresh)), predictions.logits.argmax(1))
    return small, fit_judge(JUDGES[judge], predictions, one_hot(labels, len(LABELS)))


def routed(judge: str, vectors: bool) -> tuple[NgramModel, Router]:
    small, judged = models(judge, vectors)
    return small, Router(judged)


def predict(small: NgramModel, texts: list[str]) -> Predictions:
    inputs = PREPROCESSOR.batch(texts)
    with torch.inference_mode():
        return Predictions(*(part.numpy() for part in small(*map(torch.from_numpy, joined(inputs)))))


@cache
def session(judge: str, vectors: bool, candidates: int = 3) -> Session:
    small, judged = models(judge, vectors)
    return Session(fuse_ngrams(small, Router(judged), candidates).SerializeToString())


def compare(judge: str, vectors: bool, texts: list[str], candidates: int = 3) -> dict[str, Any]:
    small, judged = models(judge, vectors)
    predictions = predict(small, texts)
    out = session(judge, vectors, candidates).run(PREPROCESSOR.batch(texts))
    assert out["logits"] == pytest.approx(predictions.logits, abs=1e-3)
    assert out["confidence"] == pytest.approx(judged.confidence(predictions), abs=2e-4)
    assert out["top_ids"].shape == out["top_probs"].shape == (len(texts), candidates)
    p = softmax(predictions.logits)
    assert out["top_probs"] == pytest.approx(-np.sort(-p, axis=1)[:, :candidates], abs=1e-4)
    assert np.take_along_axis(p, out["top_ids"], 1) == pytest.approx(out["top_probs"], abs=1e-4)
    assert [out[name].dtype for name in ("logits", "top_ids", "top_probs", "confidence", "score")] == [
        np.float32,
        np.int64,
        np.float32,
        np.float32,
        np.float32,
    ]
    return out


@pytest.mark.parametrize("judge", JUDGES)
def test_these_judges_listen_to_length_and_unknown_words(judge: str) -> None:
    """Else the comparisons below would pass whatever the graph makes of them."""
    small, judged = models(judge, True)
    p = predict(small, split(60, seed=3).payloads)
    as_is = judged.confidence(p)
    assert np.abs(judged.confidence(Predictions(p.logits, p.length + 15, p.unknown)) - as_is).max() > 0.02
    assert np.abs(judged.confidence(Predictions(p.logits, p.length, p.unknown + 0.3)) - as_is).max() > 0.02


@pytest.mark.parametrize("judge", ["kan", "kan hidden", "mlp"])
@pytest.mark.parametrize("head", ["confidence", "max-softmax", "correctness", "benefit"])
def test_the_score_is_that_of_the_chosen_head(judge: str, head: str) -> None:
    small, judged = models(judge, True)
    fresh = split(400, seed=5)
    given = predict(small, fresh.payloads)
    rng = np.random.default_rng(0)
    # The large model knows one label hardly ever, and fails on unknown words: what the prior can't say.
    answer = given.logits.argmax(1)
    large_right = rng.random(len(fresh)) < np.where(answer == 1, 0.1, np.where(given.unknown > 0, 0.3, 0.95))
    theirs = one_hot(np.where(large_right, fresh.y, (fresh.y + 1) % len(LABELS)), len(LABELS))
    router = choose(judged, head, Selection(given, theirs, fresh.y))
    session = Session(fuse_ngrams(small, router, 3).SerializeToString())
    texts = [*split(90, seed=9).payloads, "", "zyx wvu"]
    score = router.score(predict(small, texts))
    assert session.run(PREPROCESSOR.batch(texts))["score"] == pytest.approx(score, abs=2e-4)
    assert score.min() >= 0 and score.max() <= 1
    if head not in ("confidence", "max-softmax"):
        assert np.abs(score - choose(judged, "max-softmax", None).score(predict(small, texts))).max() > 0.05


@pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
@pytest.mark.parametrize("judge", JUDGES)
def test_the_graph_is_the_model(judge: str, vectors: bool) -> None:
    texts = [*split(90, seed=9).payloads, "", "zyx wvu", "oil " * 60]
    out = compare(judge, vectors, texts)
    assert out["confidence"].std() > 0.02, "a judge that says one thing would make this test empty"


@pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
@pytest.mark.parametrize("batch", [["oil"], [""], ["a b", "", "oil price", "the", "x", "zyx", "steel rose " * 9]], ids=["1", "L=1", "7"])
def test_batches_of_one_and_seven_and_a_length_of_one(batch: list[str], vectors: bool) -> None:
    if batch == [""]:
        assert {array.shape for array in PREPROCESSOR.batch(batch).values()} == {(1, 1)}
    compare("kan", vectors, batch)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=50) | st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=4))
def test_any_text_agrees(texts: list[str]) -> None:
    compare("kan", True, texts)
    compare("kan k=1", False, texts)


@pytest.mark.parametrize("candidates", [1, 2, 3])
@pytest.mark.parametrize("judge", ["kan", "kan k=1", "mlp"])
def test_any_number_of_candidates(judge: str, candidates: int) -> None:
    compare(judge, False, split(12, seed=4).payloads, candidates)


def test_padding_changes_nothing() -> None:
    texts = [*split(6, seed=2).payloads, "oil " * 40]
    run = session("kan", True).run
    together = run(PREPROCESSOR.batch(texts))
    for row, text in enumerate(texts):
        alone = run(PREPROCESSOR.batch([text]))
        assert alone["logits"][0] == pytest.approx(together["logits"][row], abs=1e-4)
        assert alone["confidence"][0] == pytest.approx(together["confidence"][row], abs=1e-4)


@pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
@pytest.mark.parametrize("judge", JUDGES)
def test_only_plain_operators_in_one_opset(judge: str, vectors: bool) -> None:
    model = fuse_ngrams(*routed(judge, vectors), 3)
    assert {node.op_type for node in model.graph.node} <= PLAIN
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    onnx.checker.check_model(model, full_check=True)


def test_names_order_and_dynamic_axes_are_the_contract() -> None:
    graph = fuse_ngrams(*routed("kan", True), 3).graph

    def shape(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
        return value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    given = [("ids", ["B", "L"]), ("weights", ["B", "L"]), ("words", ["B", "W"]), ("word_weights", ["B", "W"])]
    assert [shape(v) for v in graph.input] == given
    wanted = [("logits", ["B", 3]), ("top_ids", ["B", 3]), ("top_probs", ["B", 3]), ("confidence", ["B"]), ("score", ["B"])]
    assert [shape(v) for v in graph.output] == wanted


def test_the_same_model_gives_the_same_bytes() -> None:
    one, two = (fuse_ngrams(*routed("kan", True), 3).SerializeToString() for _ in range(2))
    assert one == two
