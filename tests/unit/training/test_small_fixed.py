from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from small_kit import BUCKETS, LABELS, UNKNOWN, WORDS, Graph, ngram_table, split, table, task_of, through, tokenizer_json

from kcm.app.models import load_small_kind
from kcm.errors import ConfigError
from kcm.preprocess import NgramPreprocessor
from kcm.task import Task
from training.fixed import Fixed, FixedGraph
from training.ngrams import joined
from training.program import distil_run, train_run
from training.run import load_run, save_run

TOKENS = {"kind": "tokenizer", "tokenizer": "tokenizer.json", "max_tokens": 16}
NGRAMS = {"kind": "ngrams", "buckets": BUCKETS}
NGRAM_GRAPH = Graph(first="ids", second="weights", integer=TensorProto.INT32, weight=TensorProto.FLOAT)


def placed(folder: Path, model: onnx.ModelProto | bytes, *, logits: str = "logits", preprocess: dict[str, Any] = TOKENS) -> Task:
    """A task beside the graph and its tokenizer."""
    (folder / "model.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return task_of(folder, {"kind": "onnx", "path": "model.onnx", "logits": logits}, preprocess)


def by_hand(texts: list[str]) -> NDArray[np.float32]:
    """The mean of a text's rows of the table [N, C], one text at a time."""
    rows = table(2 + len(WORDS), {i: [2 + i] for i in range(len(LABELS))})
    ids = [[2 + WORDS.index(word) if word in WORDS else UNKNOWN for word in text.split()] for text in texts]
    return np.stack([rows[i].mean(0) for i in ids])


@pytest.mark.parametrize(
    "graph",
    [
        Graph(),
        Graph(logits="scores", extra="token_type_ids"),
        Graph(integer=TensorProto.INT32, weight=TensorProto.FLOAT),
        Graph(half=True),
        Graph(opset=13),
        Graph(opset=21),
    ],
    ids=["plain", "named-and-segments", "other-types", "half", "opset-13", "opset-21"],
)
def test_a_graph_on_tokens_goes_all_the_way_to_the_edge(tmp_path: Path, graph: Graph) -> None:
    task = placed(tmp_path, graph.model(), logits=graph.logits)
    data = split()
    journey = through(task, load_small_kind(task, lambda _: None), tmp_path, data)
    expected = by_hand(data.payloads)
    assert [answer.label_id for answer in journey.answers] == expected.argmax(1).tolist()
    np.testing.assert_allclose(journey.run.out_of_fold.logits, expected, atol=5e-3 if graph.half else 1e-5)
    assert journey.report.labels == 0 and journey.report.decisions == journey.report.excused
    assert journey.bundle.files["tokenizer.json"] == tokenizer_json()
    fused = onnx.load_model_from_string(journey.bundle.model("fp32"))
    assert [output.name for output in fused.graph.output] == ["logits", "top_ids", "top_probs", "confidence", "score"]
    assert {i.name: i.type.tensor_type.elem_type for i in fused.graph.input} == {
        "input_ids": TensorProto.INT64,
        "attention_mask": TensorProto.INT64,
    }
    assert fused.opset_import[0].version == max(18, graph.opset)


def test_a_graph_on_hashed_ngrams_goes_all_the_way_to_the_edge(tmp_path: Path) -> None:
    task = placed(tmp_path, NGRAM_GRAPH.model(), preprocess=NGRAMS)
    data = split()
    journey = through(task, load_small_kind(task, lambda _: None), tmp_path, data)
    values, preprocessor = ngram_table(), NgramPreprocessor(task.preprocess)
    rows = [joined(preprocessor.batch([text])) for text in data.payloads]
    expected = np.concatenate([weights @ values[ids[0]] / weights.sum() for ids, weights in rows])
    assert [answer.label_id for answer in journey.answers] == expected.argmax(1).tolist()
    assert "tokenizer.json" not in journey.bundle.files
    words = [len(set(text.split())) for text in data.payloads]
    assert journey.run.out_of_fold.length.tolist() == words


def test_length_and_unknown_share_are_read_from_the_tokens(tmp_path: Path) -> None:
    kind = Fixed(placed(tmp_path, Graph().model()))
    features = kind.featurise(["oil zyx price zyx", "steel", "", "the " * 40])
    assert features.length.tolist() == [4, 1, 0, 16]
    assert features.unknown.tolist() == [0.5, 0, 0, 0]


def test_a_distillation_round_refits_the_judge_and_leaves_the_graph(tmp_path: Path) -> None:
    task = placed(tmp_path, Graph().model())
    kind, data, stream = Fixed(task), split(), split(90, seed=1)
    first = train_run(task, kind, data, None, seed=0, progress=lambda _: None)
    teacher = 8 * np.eye(len(LABELS), dtype=np.float32)[stream.y]
    second = distil_run(
        first, kind, data, None, stream.payloads, teacher, parent="p", teacher_id="t", gauge=None, seed=0, progress=lambda _: None
    )
    assert second.small == first.small and second.small.model == (tmp_path / "model.onnx").read_bytes()
    assert len(second.out_of_fold) == len(data) + len(stream)
    probe = kind.featurise(stream.payloads)
    assert np.abs(first.judge.confidence(probe) - second.judge.confidence(probe)).max() > 1e-3


def test_a_run_keeps_its_own_graph_and_refuses_features_of_another(tmp_path: Path) -> None:
    task = placed(tmp_path, Graph().model())
    original = (tmp_path / "model.onnx").read_bytes()
    save_run(tmp_path / "run", train_run(task, Fixed(task), split(), None, seed=0, progress=lambda _: None))
    changed = Graph().model()
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(table(2 + len(WORDS), {}, seed=9), "table"))
    placed(tmp_path, changed)
    run = load_run(tmp_path / "run")
    assert isinstance(run.small, FixedGraph) and run.small.model == original
    kind = Fixed(task)
    with pytest.raises(ConfigError, match="has changed since the run"):
        kind.predict(run.small, kind.featurise(["oil"]))
    (tmp_path / "run" / "small.onnx").unlink()
    with pytest.raises(ConfigError, match=r"lacks .*small\.onnx"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (Graph(logits="scores"), r"no output 'logits'; its outputs are 'probabilities', 'scores'"),
        (Graph(classes=4), r"shape \[1, 4\] for one sample, the task has 3 labels"),
        (Graph(first="tokens"), r"an input 'tokens'; \[preprocess\] kind = 'tokenizer' makes input_ids, attention_mask"),
        (Graph(extra="position_ids"), "an input 'position_ids'"),
        (Graph(batch=1), "can't run on texts of unlike length"),
        (Graph(length=16), "can't run on texts of unlike length"),
        (Graph(masked=False), "change by .* when it is padded beside a longer one"),
        (Graph(weight=TensorProto.DOUBLE), r"input 'attention_mask' is tensor\(double\)"),
        (NGRAM_GRAPH, "an input 'ids'"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(tmp_path: Path, graph: Graph, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Fixed(placed(tmp_path, graph.model()))


def test_logits_that_are_no_floats_or_not_finite_are_refused(tmp_path: Path) -> None:
    model = Graph().model()
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["best"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, None))
    with pytest.raises(ConfigError, match=r"output 'best' is tensor\(int64\)"):
        Fixed(placed(tmp_path, model, logits="best"))
    model = Graph().model()
    one = next(tensor for tensor in model.graph.initializer if tensor.name == "one")
    one.CopyFrom(numpy_helper.from_array(np.array([0.0], np.float32), "one"))  # an empty text then divides by zero
    with pytest.raises(ConfigError, match="not finite for the text ''"):
        Fixed(placed(tmp_path, model))


def external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same tensor, its data said to lie in another file."""
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    return tensor


def test_tensors_in_another_file_are_refused_wherever_they_hide(tmp_path: Path) -> None:
    outside = Graph().model()
    external(outside.graph.initializer[0])
    with pytest.raises(ConfigError, match="keeps 'table' in another file"):
        Fixed(placed(tmp_path, outside))
    hidden = with_branch()
    branch = next(node for node in hidden.graph.node if node.op_type == "If").attribute[0].g
    external(branch.node[0].attribute[0].t)
    with pytest.raises(ConfigError, match="keeps 'shift' in another file"):
        Fixed(placed(tmp_path, hidden))


def with_branch() -> onnx.ModelProto:
    """A graph with a subgraph that reads a value of the outer one."""
    model = Graph().model()
    graph = model.graph
    next(node for node in graph.node if node.output[0] == "logits").output[0] = "plain"

    def branch(value: float) -> onnx.GraphProto:
        shift = helper.make_tensor("shift", TensorProto.FLOAT, [1], np.array([value], np.float32).tobytes(), raw=True)
        nodes = [helper.make_node("Constant", [], ["by"], value=shift), helper.make_node("Add", ["plain", "by"], ["shifted"])]
        return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("shifted", TensorProto.FLOAT, None)])

    yes = numpy_helper.from_array(np.array(True), "yes")
    graph.initializer.append(yes)
    chosen = helper.make_node("If", ["yes"], ["logits"], then_branch=branch(2.0), else_branch=branch(0.0))
    graph.node.insert(len(graph.node) - 1, chosen)
    return model


def test_subgraphs_and_initializers_named_as_inputs_survive_the_fusion(tmp_path: Path) -> None:
    model = with_branch()
    model.graph.input.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, [2 + len(WORDS), len(LABELS)]))
    task = placed(tmp_path, model)
    data = split()
    journey = through(task, Fixed(task), tmp_path, data)
    np.testing.assert_allclose(journey.run.out_of_fold.logits, by_hand(data.payloads) + 2, atol=1e-5)


@pytest.mark.parametrize("data", [b"", b"no graph at all"])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError, match="can't be read as ONNX"):
        Fixed(placed(tmp_path, data))


def test_a_graph_that_the_runtime_refuses_says_why(tmp_path: Path) -> None:
    model = Graph().model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ConfigError, match=r"can't be loaded by ONNX Runtime: .*NoSuchOperator"):
        Fixed(placed(tmp_path, model))


def test_missing_files_are_named_with_what_to_set(tmp_path: Path) -> None:
    task = placed(tmp_path, Graph().model())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Fixed(task)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        Fixed(task)
    with pytest.raises(ConfigError, match=r'fix: set tokenizer = "tokenizer\.json"'):
        Fixed(placed(tmp_path, Graph().model(), preprocess={"kind": "tokenizer"}))
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ConfigError, match=r"model\.onnx does not exist"):
        Fixed(task)
    with pytest.raises(ConfigError, match="needs a path"):
        Fixed(task_of(tmp_path, {"kind": "onnx"}, TOKENS))
