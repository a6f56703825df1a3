"""What tests of the user's own small models share: a tiny task, a tokenizer, ONNX graphs, and the whole path to the edge."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import EdgeRuntime
from export.bundle import export_bundle
from export.verify import Report, verify
from kcm.bundle import Bundle, load_bundle
from kcm.preprocess import GROUPS, NgramPreprocessor
from kcm.sample import Answer, Sample
from kcm.task import PreprocessSpec, Task, parse_task
from training.data import Split
from training.ngrams import joined
from training.program import train_run
from training.run import Run, load_run, save_run
from training.small import Small

LABELS = ("oil", "steel", "profit")
_MORE = ("the", "a", "of", "company", "said", "price", "year", "rose", "fell", "quarter", "ton", "barrel")
WORDS = (*LABELS, *_MORE)
PAD, UNKNOWN = 0, 1
BUCKETS = 2**10


def tokenizer_json(*, unknown: str = "[UNK]") -> bytes:
    """Word-level, without special tokens: an empty text has no token of its own."""
    vocabulary = {"[PAD]": PAD, "[UNK]": UNKNOWN, **{word: 2 + i for i, word in enumerate(WORDS)}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown},
        }
    ).encode()


def split(rows: int = 120, seed: int = 0) -> Split:
    """Texts that name their label's word and, one in four, another label's too; one in five has words that nobody knows."""
    random = np.random.default_rng(seed)
    labels = np.arange(rows) % len(LABELS)
    texts = []
    for label in labels:
        words = [LABELS[label], *random.choice(_MORE, random.integers(1, 9))]
        if random.random() < 0.25:
            words += [LABELS[random.integers(len(LABELS))]]
        if random.random() < 0.2:
            words += ["zyx", "wvu"]
        texts.append(" ".join(random.permutation(words)))
    return Split("train", texts, labels.astype(np.int64))


def task_of(root: Path, small: dict[str, Any], preprocess: dict[str, Any], labels: tuple[str, ...] = LABELS) -> Task:
    values = {"task": {"id": "tiny", "labels": list(labels)}, "small": small, "preprocess": preprocess, "judge": {"epsilon": 0.5}}
    return parse_task(values, "task.toml", root=str(root))


def table(rows: int, columns: dict[int, list[int]], seed: int = 0, classes: int = len(LABELS)) -> NDArray[np.float32]:
    """[rows, classes]: noise, and `columns` (label → its rows) speaking for a label."""
    values = np.random.default_rng(seed).normal(0, 0.3, (rows, classes)).astype(np.float32)
    for label, places in columns.items():
        values[places, label] += 6.0 / len(places)
    return values


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A user's graph: rows of a table, weighted by the mask (or the n-gram weights) and averaged."""

    first: str = "input_ids"
    second: str = "attention_mask"
    extra: str = ""
    integer: int = TensorProto.INT64
    weight: int = TensorProto.INT64
    logits: str = "logits"
    half: bool = False
    masked: bool = True
    batch: str | int = "N"
    length: str | int = "T"
    opset: int = 18
    classes: int = len(LABELS)

    def model(self) -> onnx.ModelProto:
        ngrams = self.first == "ids"
        values = ngram_table() if ngrams else table(2 + len(WORDS), {i: [2 + i] for i in range(len(LABELS))}, classes=self.classes)
        axes = [numpy_helper.from_array(np.array([axis]), f"axis{axis}") for axis in (1, 2)]
        one = numpy_helper.from_array(np.array([1.0], np.float32), "one")
        nodes = [
            helper.make_node("Gather", ["table", self.first], ["rows"]),
            # Not cast where it is float already: a graph that is fed another type than it declares must fail.
            helper.make_node("Identity", [self.second], ["w0"])
            if self.masked and self.weight == TensorProto.FLOAT
            else helper.make_node("Cast", [self.second if self.masked else self.first], ["w0"], to=TensorProto.FLOAT),
            *([] if self.masked else [helper.make_node("Exp", ["w0"], ["w1"])]),
            helper.make_node("Unsqueeze", ["w0" if self.masked else "w1", "axis2"], ["w"]),
            helper.make_node("Mul", ["rows", "w"], ["scaled"]),
            helper.make_node("ReduceSum", ["scaled", "axis1"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["w", "axis1"], ["count"], keepdims=0),
            helper.make_node("Max", ["count", "one"], ["clamped"]),
            helper.make_node("Div", ["total", "clamped"], ["top_ids"]),  # a name of ours: the prefix must keep them apart
        ]
        inputs = [(self.first, self.integer), (self.second, self.weight)]
        last = "top_ids"
        if self.extra:
            inputs.append((self.extra, TensorProto.INT64))
            nodes += [
                helper.make_node("Cast", [self.extra], ["segments"], to=TensorProto.FLOAT),
                helper.make_node("ReduceSum", ["segments", "axis1"], ["extra_sum"], keepdims=1),
                helper.make_node("Add", ["top_ids", "extra_sum"], ["with_extra"]),
            ]
            last = "with_extra"
        nodes.append(helper.make_node("Cast", [last], [self.logits], to=TensorProto.FLOAT16 if self.half else TensorProto.FLOAT))
        nodes.append(helper.make_node("Softmax", [self.logits], ["probabilities"], axis=1))
        shape = [self.batch, self.length]
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "theirs",
            [helper.make_tensor_value_info(name, element, shape) for name, element in inputs],
            [helper.make_tensor_value_info(name, kind, [self.batch, self.classes]) for name in ("probabilities", self.logits)],
            [numpy_helper.from_array(values, "table"), one, *axes],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def ngram_table() -> NDArray[np.float32]:
    """Rows of hashed ids: each label's word speaks for it."""
    preprocessor = NgramPreprocessor(PreprocessSpec(buckets=BUCKETS))
    places = {i: joined(preprocessor.batch([label]))[0][0].tolist() for i, label in enumerate(LABELS)}
    return table(GROUPS * BUCKETS, places) * 6


@dataclass(frozen=True)
class Journey:
    """What came out at each station: the reloaded run, the bundle, verify's report, the edge's answers."""

    run: Run
    bundle: Bundle
    report: Report
    answers: list[Answer]


def through(task: Task, kind: Small, folder: Path, data: Split) -> Journey:
    """fit → save → load → export → load → verify → answers of an in-process edge."""
    save_run(folder / "run", train_run(task, kind, data, None, seed=0, progress=lambda _: None))
    run = load_run(folder / "run")
    export_bundle(run, folder / "bundle", golden_payloads=[*data.payloads[:12], ""])
    bundle = load_bundle(folder / "bundle")
    report = verify(run, kind, bundle, [*data.payloads, ""])
    answers = EdgeRuntime.load(folder / "bundle").infer([Sample(payload=text) for text in data.payloads])
    return Journey(run, bundle, report, answers)
