from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cloud_kit
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from small_kit import LABELS, Graph, split, task_of, tokenizer_json

from export.encoder import fuse_encoder
from export.fixed import fuse_fixed
from export.session import Session
from kcm.errors import ConfigError
from kcm.task import JudgeSpec
from training.encoder import Encoder
from training.fit import one_hot
from training.fixed import Fixed, FixedGraph
from training.judge import Judge
from training.select import Router
from training.small import Examples, Small

TEXTS = ["oil zyx wvu", "the price of steel rose", "", "profit " * 30, "the company said"]
# What TensorRT and TensorRT-RTX can't build, or only on the host.
HOSTILE = {"Loop", "Scan", "If", "NonZero", "SequenceEmpty", "SequenceInsert", "SequenceAt", "SplitToSequence", "ConcatFromSequence"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud_kit.tiny_bert(tmp_path_factory.mktemp("bert") / "weights")


def stirred_judge(seed: int = 3) -> Judge:
    """A judge with random curves: its C_x depends on every input, length and unknown share too."""
    torch.manual_seed(seed)
    judge = Judge(JudgeSpec(), len(LABELS))
    with torch.no_grad():
        for parameter in judge.layers.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return judge


def encoder_kind(bert: Path, max_tokens: int = 20) -> Encoder:
    return Encoder(task_of(bert, {"kind": "encoder", "path": str(bert)}, {"kind": "tokenizer", "max_tokens": max_tokens}))


def fixed_kind(folder: Path, graph: Graph, preprocess: dict[str, object]) -> Fixed:
    (folder / "model.onnx").write_bytes(graph.model().SerializeToString())
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return Fixed(task_of(folder, {"kind": "onnx", "path": "model.onnx"}, preprocess))


def cases(bert: Path, folder: Path) -> Iterator[tuple[Small, object, bytes, Judge]]:
    judge = stirred_judge()
    encoder = encoder_kind(bert)
    head = encoder.fit(_examples(encoder))
    yield encoder, head, fuse_encoder(head, Router(judge), 3), judge
    tokens = fixed_kind(folder, Graph(), {"kind": "tokenizer", "tokenizer": "tokenizer.json", "max_tokens": 20})
    yield tokens, tokens.graph, fuse_fixed(tokens.graph, Router(judge), 3), judge
    ngrams = Graph(first="ids", second="weights", integer=TensorProto.INT32, weight=TensorProto.FLOAT)
    hashed = fixed_kind(folder, ngrams, {"kind": "ngrams", "buckets": 2**10})
    yield hashed, hashed.graph, fuse_fixed(hashed.graph, Router(judge), 3), judge


def _examples(kind: Small) -> Examples:
    data = split()
    ones = np.ones(len(data), np.float32)
    return Examples(kind.featurise(data.payloads), one_hot(data.y, len(LABELS)), ones, ones > 0, ones < 0)


def test_the_graph_reads_length_and_unknown_as_training_does(bert: Path, tmp_path: Path) -> None:
    for kind, model, fused, judge in cases(bert, tmp_path):
        predictions = kind.predict(model, kind.featurise(TEXTS))
        expected = judge.confidence(predictions)
        session, preprocessor = Session(fused), kind.preprocessor  # type: ignore[attr-defined]
        together = session.run(preprocessor.batch(TEXTS))
        alone = np.concatenate([session.run(preprocessor.batch([text]))["confidence"] for text in TEXTS])
        np.testing.assert_allclose(together["logits"], predictions.logits, atol=1e-4)
        np.testing.assert_allclose(together["confidence"], expected, atol=1e-4)
        np.testing.assert_allclose(alone, expected, atol=1e-4)
        for name in ("length", "unknown"):  # the judge must have read it, else this test says nothing
            changed = judge.confidence(type(predictions)(**{**vars(predictions), name: getattr(predictions, name) + np.float32(0.3)}))
            assert np.abs(changed - expected).max() > 1e-3, name


def test_an_encoders_graph_holds_plain_operators_and_nothing_of_this_machine(bert: Path) -> None:
    encoder = encoder_kind(bert)
    data = fuse_encoder(encoder.fit(_examples(encoder)), Router(stirred_judge()), 3)
    model = onnx.load_model_from_string(data)
    assert not {node.op_type for node in model.graph.node} & HOSTILE
    assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in model.graph.output] == ["logits", "top_ids", "top_probs", "confidence", "score"]
    for trace in (b"stack_trace", b"pkg.torch", b"site-packages", str(bert).encode()):
        assert trace not in data


def test_an_old_graph_that_can_not_be_converted_says_so(tmp_path: Path) -> None:
    model = Graph(opset=13).model()
    model.graph.node[0].op_type = "NoSuchOperator"
    small = FixedGraph(model.SerializeToString(), "logits", len(LABELS), tokenizer_json(), 0)
    with pytest.raises(ConfigError, match="has opset 13, and conversion to 18 fails"):
        fuse_fixed(small, Router(stirred_judge()), 3)
