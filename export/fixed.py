"""Any small model's graph with the judge behind it: the user's own (training/fixed.py), or a trace (export/encoder.py, vision.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, version_converter

from export.graph import OPSET, bundle_outputs
from export.judge import append_judge
from export.nodes import Nodes
from kcm.errors import ConfigError
from training.fixed import ZERO_INPUTS, FixedGraph
from training.kan_forms import Precision as JudgePrecision
from training.select import Router
from training.tokens import unknown_id

Counts = Callable[[Nodes], tuple[str, str]]  # adds nodes that give length [B, 1] and unknown [B, 1]
Feed = Callable[[Nodes, onnx.ValueInfoProto], str]  # adds nodes that give one of a graph's own inputs: that name, or one of our inputs

_PREFIX = "small/"  # of every name that came with the graph: none can clash with ours
_IR = 8  # the oldest that knows opset 18
TOKEN_INPUTS = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64}
_NGRAM_INPUTS = {"ids": TensorProto.INT32, "weights": TensorProto.FLOAT, "words": TensorProto.INT32, "word_weights": TensorProto.FLOAT}
_JOINED = {"ids": ("words", "ids"), "weights": ("word_weights", "weights")}  # training.ngrams.joined


def fuse_fixed(small: FixedGraph, router: Router, candidates: int) -> bytes:
    """The user's graph, as it is, with the judge's nodes behind its logits.

    Raises:
        ConfigError: it has an opset below 18 and can't be converted.
    """
    return append_to(fixed_graph(small), fixed_counts(small), router, small.classes, candidates)


def fixed_graph(small: FixedGraph) -> onnx.ModelProto:
    """The user's graph from our inputs to `logits`. Raises as fuse_fixed does."""
    inputs = TOKEN_INPUTS if small.tokenizer_json else _NGRAM_INPUTS
    return adapted(onnx.load_model_from_string(small.model), small.logits, inputs, small.classes)


def fixed_counts(small: FixedGraph) -> Counts:
    return token_counts(unknown_id(small.tokenizer_json)) if small.tokenizer_json else word_counts


def adapted(model: onnx.ModelProto, logits: str, inputs: dict[str, int], classes: int) -> onnx.ModelProto:
    """A graph that reads `inputs` (name → element type), [B, L] (words: [B, W]), and gives `logits` [B, C] as fp32, its own names prefixed.

    The graph's own inputs may be fewer, of another type, or among training.fixed.ZERO_INPUTS. One on hashed ids gets words and the
    rest as one row.
    """

    def feed(nodes: Nodes, value: onnx.ValueInfoProto) -> str:
        _feed(nodes, value.name.removeprefix(_PREFIX), value.name, value.type.tensor_type.elem_type, inputs)
        return str(value.name)

    ours = [helper.make_tensor_value_info(name, kind, ["B", "W" if "word" in name else "L"]) for name, kind in inputs.items()]
    return wrapped(model, logits, ours, feed, classes)


def wrapped(model: onnx.ModelProto, logits: str, inputs: list[onnx.ValueInfoProto], feed: Feed, classes: int) -> onnx.ModelProto:
    """A graph that reads `inputs`, from which `feed` makes its own, and gives `logits` [B, C] as fp32; its own names are prefixed.

    Raises:
        ConfigError: it has an opset below 18 and can't be converted.
    """
    model = compose.add_prefix(_at_least_opset(model), _PREFIX)
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    element = next(v.type.tensor_type.elem_type for v in graph.output if v.name == _PREFIX + logits)

    before, after = Nodes("in/"), Nodes("out/")
    for value in [value for value in graph.input if value.name not in constants]:
        if (fed := feed(before, value)) != value.name:
            _rename(graph, value.name, fed)
    if element == TensorProto.FLOAT:
        after("Identity", _PREFIX + logits, out="logits")
    else:
        after("Cast", _PREFIX + logits, out="logits", to=TensorProto.FLOAT)
    _replace(
        graph,
        node=[*before.nodes, *graph.node, *after.nodes],
        initializer=[*graph.initializer, *before.initializers],
        input=inputs,
        output=[helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", classes])],
        value_info=[],  # shapes under the names of another graph; the runtime infers its own
    )
    model.ir_version = max(model.ir_version, _IR)
    return model


def append_to(
    model: onnx.ModelProto, counts: Counts | None, router: Router, classes: int, candidates: int, precision: JudgePrecision = "fp32"
) -> bytes:
    """The bundle's five outputs behind an adapted graph's `logits`; serialised. `model` is changed.

    Without counts (images) the judge reads a length and an unknown share of 0.
    """
    graph = model.graph
    nodes = Nodes()
    length, unknown = counts(nodes) if counts is not None else (None, None)
    append_judge(nodes, router, "logits", length, unknown, candidates, precision)
    _replace(
        graph,
        node=[*graph.node, *nodes.nodes],
        initializer=[*graph.initializer, *nodes.initializers],
        output=bundle_outputs(classes, candidates),
        value_info=[],
    )
    model.producer_name = graph.name = "kcm"
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """What reads `old` reads `new`, in subgraphs too."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for inner in (inner for attribute in node.attribute for inner in (attribute.g, *attribute.graphs)):
            _rename(inner, old, new)


def _replace(graph: onnx.GraphProto, **fields: list[Any]) -> None:
    for name, values in fields.items():
        graph.ClearField(name)
        getattr(graph, name).extend(values)


def token_counts(unknown: int | None) -> Counts:
    """Mirrors training.tokens.token_counts."""

    def append(nodes: Nodes) -> tuple[str, str]:
        mask = nodes("Cast", nodes("Greater", "attention_mask", np.array(0, np.int64)), to=TensorProto.FLOAT)
        length = nodes("ReduceSum", mask, np.array([1]), keepdims=1)
        if unknown is None:
            return length, nodes("Mul", length, 0.0)
        missing = nodes("Mul", mask, nodes("Cast", nodes("Equal", "input_ids", np.array(unknown, np.int64)), to=TensorProto.FLOAT))
        return length, nodes("Div", nodes("ReduceSum", missing, np.array([1]), keepdims=1), nodes("Max", length, 1.0))

    return append


def word_counts(nodes: Nodes) -> tuple[str, str]:
    """Mirrors training.fixed.Fixed: distinct words, none of them unknown."""
    word = nodes("Cast", nodes("Greater", "word_weights", 0.0), to=TensorProto.FLOAT)
    length = nodes("ReduceSum", word, np.array([1]), keepdims=1)
    return length, nodes("Mul", length, 0.0)


def _feed(nodes: Nodes, name: str, inner: str, kind: int, inputs: dict[str, int]) -> None:
    """From our input to the graph's own: as it is, cast, or zeros."""
    if name in ZERO_INPUTS:
        first, element = next(iter(inputs.items()))
        zeros = nodes("Mul", first, np.zeros((), helper.tensor_dtype_to_np_dtype(element)))
        nodes("Cast", zeros, out=inner, to=kind)
        return
    ours = nodes("Concat", *_JOINED[name], axis=1) if "words" in inputs else name
    if kind == inputs[name]:
        nodes("Identity", ours, out=inner)
    else:
        nodes("Cast", ours, out=inner, to=kind)


def _at_least_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The judge's nodes need opset 18; a newer one stays as it is."""
    found = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if found >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter has no error type of its own
        raise ConfigError(
            f"the small model's graph has opset {found}, and conversion to {OPSET} fails: {error}",
            fix=f"export it with opset {OPSET} or later",
        ) from error
