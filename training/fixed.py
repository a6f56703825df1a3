"""A small model that is the user's own ONNX graph with named logits. It is never trained here: only the judge and ε are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import ConfigError, require
from kcm.preprocess import Inputs, NgramPreprocessor, Preprocessor
from kcm.sample import Payload
from kcm.task import Task
from training.judge import Predictions
from training.ngrams import joined
from training.small import Examples
from training.tokens import like_length, load_tokenizer, token_counts, unknown_id

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

ZERO_INPUTS = ("token_type_ids",)  # fed with zeros: one segment
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
_LOGIT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")
_CHARACTERS = 5  # of a token or word, roughly: sizes batches, nothing else
ALIKE = 1e-3  # of a sample's logits alone and in a batch, relative to the largest: fp16 graphs round
_NGRAM_INPUTS = ("ids", "weights")  # what a graph on hashed ids reads: words, word pairs and character n-grams in one row
_GRAPH_FILE, _TOKENIZER_FILE = "small.onnx", "tokenizer.json"


@dataclass(frozen=True)
class FixedGraph:
    """The user's graph as bytes, its logits output's name, and what it reads: `tokenizer_json`, or hashed ids, or images.

    A graph on hashed ids reads `ids` and `weights` [B, L], words first (training.ngrams.joined); what pads has weight 0, and may stand
    anywhere in a row.

    `buckets`: of one group of hashed ids (kcm.preprocess), 0 without any.
    """

    model: bytes
    logits: str
    classes: int
    tokenizer_json: bytes
    buckets: int

    def save(self, run: Path) -> None:
        """The whole graph: a run must not change when the user's file does."""
        (run / _GRAPH_FILE).write_bytes(self.model)
        if self.tokenizer_json:
            (run / _TOKENIZER_FILE).write_bytes(self.tokenizer_json)

    @staticmethod
    def load(run: Path, task: Task) -> FixedGraph:
        """Raises ConfigError where the run's copy of the graph or of the tokenizer is gone."""
        try:
            kind = task.preprocess.kind
            tokenizer = (run / _TOKENIZER_FILE).read_bytes() if kind == "tokenizer" else b""
            model = (run / _GRAPH_FILE).read_bytes()
        except OSError as error:
            raise ConfigError(f"{run} lacks {error.filename}: {error.strerror}", fix="kcm train   makes a run") from error
        return FixedGraph(model, task.small.logits, len(task.labels), tokenizer, task.preprocess.buckets if kind == "ngrams" else 0)


class Fixed:
    """The kind of small model (training/small.py): its features are its predictions, made once per text.

    `fit` returns the graph as it is, so what fit.cross_fit calls out-of-fold predictions are its own predictions. They are
    honest only where the task's train file holds nothing that the graph was trained on; else the judge learns from a
    confidence that lies. A distillation round refits the judge and ε, the graph stays.
    """

    def __init__(self, task: Task) -> None:
        """Read the graph, check it against the task, and run it once.

        Raises:
            ConfigError: the graph or its tokenizer is missing, keeps tensors outside its file, reads inputs that the
                preprocessing doesn't make, has no such output, another number of classes, or a fixed batch or length.
        """
        self.preprocessor, tokenizer = _preprocessor(task)
        self._path, self._spec = graph_path(task), task.preprocess
        self._names = self.preprocessor.names if tokenizer else _NGRAM_INPUTS
        self._unknown = unknown_id(tokenizer) if tokenizer else None
        model = self._path.read_bytes()
        refuse_external(model, self._path)
        buckets = 0 if tokenizer else task.preprocess.buckets
        self.graph = FixedGraph(model, task.small.logits, len(task.labels), tokenizer, buckets)
        self._session: Any = open_session(model, self._path)
        self._types = self._check_signature()
        self._try(task.labels)

    def featurise(self, payloads: Sequence[Payload]) -> Predictions:
        out = Predictions(np.zeros((len(payloads), self.graph.classes), np.float32), *np.zeros((2, len(payloads)), np.float32))
        for rows in like_length(payloads, _CHARACTERS * max(self._spec.max_tokens, self._spec.max_words)):
            inputs = self.preprocessor.batch([payloads[row] for row in rows])
            out.logits[rows] = self._run(inputs)
            out.length[rows], out.unknown[rows] = self._counts(inputs)
        return out

    def take(self, features: Predictions, index: Index) -> Predictions:
        return features.take(index)

    def join(self, first: Predictions, second: Predictions) -> Predictions:
        return Predictions.concatenate([first, second])

    def fit(self, examples: Examples) -> FixedGraph:
        return self.graph

    def predict(self, model: FixedGraph, features: Predictions) -> Predictions:
        """Raises ConfigError where `model` is another graph than the one that made the features."""
        if model != self.graph:
            raise ConfigError(f"{self._path} or its tokenizer has changed since the run was made", fix="kcm train   makes a run with it")
        return features

    def _run(self, inputs: Inputs) -> Float32:
        if isinstance(self.preprocessor, NgramPreprocessor):
            inputs = dict(zip(_NGRAM_INPUTS, joined(inputs), strict=True))
        first = next(iter(inputs.values()))
        feed = {name: inputs.get(name, np.zeros_like(first)).astype(kind) for name, kind in self._types.items()}
        logits: Float32 = self._session.run([self.graph.logits], feed)[0].astype(np.float32)
        return logits

    def _counts(self, inputs: Inputs) -> tuple[Float32, Float32]:
        """Length [B] and unknown [B]; a graph on hashed ids has no word that it doesn't know."""
        if self.graph.tokenizer_json:
            return token_counts(inputs, self._unknown)
        length = (inputs["word_weights"] > 0).sum(1).astype(np.float32)
        return length, np.zeros_like(length)

    def _check_signature(self) -> dict[str, Any]:
        """The numpy type of each input; raises ConfigError for inputs and outputs that don't fit."""
        names = self._names
        inputs = {node.name: node.type for node in self._session.get_inputs()}
        allowed = (*names, *ZERO_INPUTS) if self.graph.tokenizer_json else names
        if unknown := sorted(set(inputs) - set(allowed)):
            raise ConfigError(
                f"{self._path} has an input {unknown[0]!r}; [preprocess] kind = {self._spec.kind!r} makes {', '.join(names)}",
                fix="rename the graph's inputs, or change [preprocess] kind",
            )
        if names[0] not in inputs:
            raise ConfigError(f"{self._path} has no input {names[0]!r}, only {', '.join(inputs) or 'none'}")
        if odd := next((name for name, kind in inputs.items() if kind not in _TYPES), None):
            raise ConfigError(f"{self._path}: input {odd!r} is {inputs[odd]}; int64, int32 and float can be fed")
        check_logits(self._session, self.graph.logits, self._path)
        return {name: _TYPES[kind] for name, kind in inputs.items()}

    def _try(self, labels: tuple[str, ...]) -> None:
        """Texts of unlike length, together and alone: shape, finite values, and padding that changes nothing."""
        texts = [labels[0], " ".join(labels), ""]
        try:
            alone = [self._run(self.preprocessor.batch([text])) for text in texts]
            together = self._run(self.preprocessor.batch(texts))
        except Exception as error:  # the runtime has a dozen exception types without a common base
            raise ConfigError(
                f"{self._path} can't run on texts of unlike length: {error}", fix="export it with dynamic batch and length (dynamic_axes)"
            ) from error
        apart = alike(alone, together, f"{self._path}: output {self.graph.logits!r}", labels, [f"the text {text!r}" for text in texts])
        if not apart <= ALIKE:
            raise ConfigError(
                f"{self._path}: a text's logits change by {apart:.2g} when it is padded beside a longer one",
                fix=f"mask padding by {self._names[1]!r}; dynamic int8, whose scales span a batch, can't pass",
            )


def _preprocessor(task: Task) -> tuple[Preprocessor, bytes]:
    """The task's preprocessor, and tokenizer.json where it is one."""
    spec = task.preprocess
    if spec.kind == "ngrams":
        return NgramPreprocessor(spec), b""
    if not spec.tokenizer:
        raise ConfigError('[preprocess] kind = "tokenizer" needs the graph\'s tokenizer', fix='set tokenizer = "tokenizer.json" there')
    data, preprocessor = load_tokenizer(task.path(spec.tokenizer), spec)
    return preprocessor, data


def graph_path(task: Task) -> Path:
    """Raises ConfigError where task.toml names no file, or one that isn't there."""
    if not task.small.path:
        raise ConfigError('[small] kind = "onnx" needs a path', fix='path = "model.onnx", relative to task.toml')
    path = task.path(task.small.path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", fix="path under [small] names the ONNX file, relative to task.toml")
    return path


def check_logits(session: Any, logits: str, path: Path) -> None:
    """Raises ConfigError where the graph has no such output of floats."""
    outputs = {node.name: node for node in session.get_outputs()}
    if logits not in outputs:
        raise ConfigError(
            f"{path} has no output {logits!r}; its outputs are {', '.join(map(repr, outputs))}", fix="set logits under [small]"
        )
    if outputs[logits].type not in _LOGIT_TYPES:
        raise ConfigError(f"{path}: output {logits!r} is {outputs[logits].type}, logits are floats")


def alike(alone: list[Float32], together: Float32, output: str, labels: tuple[str, ...], samples: list[str]) -> float:
    """How far what the graph made of each sample alone, [1, C], is from all of them in one batch [N, C], relative to the largest.

    Raises:
        ConfigError: these aren't logits over the labels, or aren't finite.
    """
    if odd := [list(a.shape) for a in alone if a.shape != (1, len(labels))]:
        raise ConfigError(f"{output} has shape {odd[0]} for one sample, the task has {len(labels)} labels")
    if bad := [sample for sample, a in zip(samples, alone, strict=True) if not np.isfinite(a).all()]:
        raise ConfigError(f"{output} is not finite for {bad[0]}")
    if together.shape != (len(alone), len(labels)):
        return np.inf
    return float(np.abs(np.concatenate(alone) - together).max()) / max(1.0, float(np.abs(together).max()))


def open_session(model: bytes, path: Path) -> Any:
    """ONNX Runtime on one thread. Raises ConfigError where it can't load the graph."""
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # failures arrive as exceptions
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen exception types without a common base
        raise ConfigError(f"{path} can't be loaded by ONNX Runtime: {error}") from error


def refuse_external(model: bytes, path: Path) -> None:
    """A bundle ships one file, so the graph must be one.

    Raises:
        ConfigError: not an ONNX graph, or one with tensors in other files.
    """
    onnx = require("onnx", "export")
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError, by whichever implementation
        raise ConfigError(f"{path} can't be read as ONNX: {error}") from error
    if not proto.graph.node:
        raise ConfigError(f"{path} can't be read as ONNX: it has no nodes")
    if name := next((t.name for t in _tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL), None):
        raise ConfigError(
            f"{path} keeps {name!r} in another file; a bundle ships one",
            fix="onnx.save_model(onnx.load(PATH), PATH, save_as_external_data=False)",
        )


def _tensors(proto: Any) -> Iterator[Any]:
    """Every constant of a model, a graph or a function: initializers, dense and sparse, and attributes, subgraphs' too."""
    if hasattr(proto, "graph"):
        yield from _tensors(proto.graph)
        for function in proto.functions:
            yield from _tensors(function)
        return
    yield from getattr(proto, "initializer", ())
    for tensor in getattr(proto, "sparse_initializer", ()):
        yield from (tensor.values, tensor.indices)
    for attribute in (a for node in proto.node for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for tensor in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (tensor.values, tensor.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)
