"""What the edge's tests share: a tiny real bundle, and real edge and cloud processes.

The tiny task: a sample that names one of its labels is easy (C_x near 1), any other is hard.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import tomli_w
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import kcm.bundle
import kcm.task
from edge_runtime.engines.onnx import OrtEngine
from kcm.bundle import GraphSpec
from kcm.calibration import Calibration, HintGate
from kcm.preprocess import GROUPS, Preprocessor, check_sums, load_preprocessor, longest_of
from kcm.task import PreprocessSpec, SmallSpec, Task
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc, sample_pb2

LABELS = ("alpha", "beta", "gamma", "delta")
EASY = tuple(f"the {label} case" for label in LABELS)
HARD = ("nothing to see", "dim light", "who can say this")
EPSILON = 0.9
CANDIDATES = 3
_WORDS = (*LABELS, "the", "case", "nothing", "to", "see", "dim", "light", "who", "can", "say", "this")


_NGRAM_TYPES = {"ids": TensorProto.INT32, "weights": TensorProto.FLOAT, "words": TensorProto.INT32, "word_weights": TensorProto.FLOAT}


def tokenizer_json() -> bytes:
    """A word-level tokenizer of the tiny task."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: 2 + i for i, word in enumerate(_WORDS)}}
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
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        }
    ).encode()


def table_of(classes: int, seed: int) -> NDArray[np.float32]:
    """Rows of the tokenizer's ids: each label's word speaks for it."""
    table = np.random.default_rng(seed).normal(0, 0.05, (2 + len(_WORDS), classes)).astype(np.float32)
    table[0] = 0
    for label in range(classes):
        table[2 + label, label] += 6.0
    return table


def ngram_table(preprocessor: Preprocessor, buckets: int, labels: tuple[str, ...]) -> NDArray[np.float32]:
    """The same for hashed ids."""
    table = np.zeros((GROUPS * buckets, len(labels)), np.float32)
    for label, word in enumerate(labels):
        inputs = preprocessor.batch([word])
        ids = np.union1d(inputs["ids"], inputs["words"])
        table[ids, label] += 12.0 / len(ids)
    return table


def graph(table: NDArray[np.float32], *, ngrams: bool = False, external: str = "") -> bytes:
    """The fused graph with the contract's inputs and outputs: a bag of rows, softmax, top-k, C_x = best probability."""
    classes = table.shape[1]
    ids, weight = ("all_ids", "all_weights") if ngrams else ("input_ids", "attention_mask")
    weights = numpy_helper.from_array(table, "table")
    if external:
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        entry = weights.external_data.add()
        entry.key, entry.value = "location", external
    constants = [
        weights,
        numpy_helper.from_array(np.array([2], np.int64), "two"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array([0], np.int64), "zero"),
        numpy_helper.from_array(np.array([CANDIDATES], np.int64), "k"),
    ]
    joins = [
        helper.make_node("Concat", ["words", "ids"], ["all_ids"], axis=1),
        helper.make_node("Concat", ["word_weights", "weights"], ["all_weights"], axis=1),
    ]
    nodes = [
        *(joins if ngrams else ()),
        helper.make_node("Gather", ["table", ids], ["rows"]),
        helper.make_node("Cast", [weight], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("TopK", ["probabilities", "k"], ["top_probs", "top_ids"]),
        helper.make_node("Gather", ["top_probs", "zero"], ["best"], axis=1),
        helper.make_node("Squeeze", ["best", "one"], ["confidence"]),
        helper.make_node("Identity", ["confidence"], ["score"]),
    ]
    types = _NGRAM_TYPES if ngrams else {ids: TensorProto.INT64, weight: TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(name, kind, ["B", "W" if "word" in name else "L"]) for name, kind in types.items()]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", classes]),
        helper.make_tensor_value_info("top_ids", TensorProto.INT64, ["B", CANDIDATES]),
        helper.make_tensor_value_info("top_probs", TensorProto.FLOAT, ["B", CANDIDATES]),
        helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["B"]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["B"]),
    ]
    made = helper.make_graph(nodes, "fused", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def make_bundle(
    folder: Path,
    *,
    seed: int = 0,
    labels: tuple[str, ...] = LABELS,
    epsilon: float = EPSILON,
    round_: int = 0,
    golden_shift: float = 0.0,
    ngrams: bool = False,
    calibration: Calibration | None = None,
) -> Path:
    """Write a bundle that loads; with `golden_shift`, one whose every hash is right and whose golden logits are not.

    Its calibration is a bare ε, unless another one is given.
    """
    (folder / "models").mkdir(parents=True)
    files: dict[str, bytes] = {}
    if ngrams:
        preprocess = PreprocessSpec(kind="ngrams", buckets=1024)
    else:
        preprocess = PreprocessSpec(kind="tokenizer", tokenizer="tokenizer.json", max_tokens=32)
        files["tokenizer.json"] = tokenizer_json()
        (folder / "tokenizer.json").write_bytes(tokenizer_json())
    small = SmallSpec(kind="ngrams" if ngrams else "onnx")
    task = Task(id="tiny", labels=labels, preprocess=preprocess, small=small)
    preprocessor = load_preprocessor(task.preprocess, files)
    table = ngram_table(preprocessor, preprocess.buckets, labels) if ngrams else table_of(len(labels), seed)
    spec = GraphSpec(inputs=longest_of(preprocessor), candidates=CANDIDATES, max_batch=64)
    model = graph(table, ngrams=ngrams)
    (folder / "models" / "fp32.onnx").write_bytes(model)
    (folder / "task.toml").write_text(tomli_w.dumps(task.shipped()), encoding="utf-8")
    shown = HintGate(arm="candidates")
    calibration = calibration or Calibration(epsilon=epsilon, calibration_id=f"cal-{seed}", method="fixed", hint=shown)
    (folder / "calibration.json").write_bytes(msgspec.json.encode({"fp32": calibration}))
    texts = [*EASY, *HARD, "größer als ß", ""]
    inputs = preprocessor.batch(texts)
    outputs = OrtEngine(model, spec, len(labels)).infer(inputs)
    encoded = [text.encode() for text in texts]
    np.savez(
        folder / "golden.npz",
        text=np.frombuffer(b"".join(encoded), np.uint8),
        offsets=np.cumsum([0, *map(len, encoded)]),
        logits=outputs.logits + np.float32(golden_shift),
        confidence=outputs.confidence,
        score=outputs.score,
        top_ids=outputs.top_ids,
        input_sums=check_sums(inputs),
    )
    kcm.bundle.write_manifest(folder, task=task, graph=spec, version="0", round_=round_)
    return folder


class Process:
    """A real process that says `ready on ADDRESS`; its log lines end up in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("ab") as sink:
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True, env={**os.environ, **(env or {})})
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        self.address = self.metrics = ""
        if line.startswith("{"):
            ready = json.loads(line)
            self.address, self.metrics = ready["ready"], ready["metrics"]
        else:
            assert line.startswith("ready on "), f"{command}: {line!r}\n{log.read_text()}"
            self.address = line.removeprefix("ready on ").strip()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def stop(self, seconds: float = 15) -> int:
        """SIGTERM; the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(seconds)

    def scrape(self) -> dict[str, float]:
        """/metrics as {"name{labels}": value}."""
        text = urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5).read().decode()
        pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    @property
    def log(self) -> str:
        return self._log.read_text()


def edge_command(*arguments: str) -> list[str]:
    program = "import typer; from edge_runtime.cli import edge; typer.run(edge)"
    return [sys.executable, "-c", program, *arguments]


@contextlib.contextmanager
def running(command: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[Process]:
    process = Process(command, log, env)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.signal(signal.SIGCONT)
            process.kill()
        assert process.popen.stdout is not None
        process.popen.stdout.close()


def running_edge(bundle: Path, folder: Path, *more: str, **env: str) -> contextlib.AbstractContextManager[Process]:
    """A daemon on a free port that serves one bundle; its state and log lie in `folder`."""
    arguments = ["--bundle", str(bundle), "--listen", "127.0.0.1:0", "--state", str(folder / "state"), *more]
    return running(edge_command(*arguments), folder / "edge.log", env)


class Cloud:
    """The peer: tests/edge_cloud.py as a process on a fixed socket, so that it comes back at the same address."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.address = f"unix:{folder}/c.sock"
        self.database = folder / "inbox.db"
        self.set()

    def set(self, **behaviour: object) -> None:
        """Change how it answers from the next call on: mode, delay_ms, teacher."""
        temporary = self._folder / "behaviour.new"
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(self._folder / "behaviour.json")

    def run(self) -> contextlib.AbstractContextManager[Process]:
        script = Path(__file__).with_name("edge_cloud.py")
        return running([sys.executable, str(script), str(self._folder)], self._folder / "log")

    def calls(self) -> list[tuple[int, int]]:
        """(purpose, samples) of every call that was committed, in order."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT purpose, samples FROM calls ORDER BY rowid").fetchall()

    def rows(self) -> dict[str, tuple[int, int, str]]:
        """sample_id → (purpose of the first commit, how often it came, text)."""
        if not self.database.exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return {row[0]: (row[1], row[2], row[3]) for row in connection.execute("SELECT sample_id, purpose, times, text FROM inbox")}

    def sent(self) -> dict[str, dict[str, Any]]:
        """sample_id → everything that was kept of its first commit."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return {row["sample_id"]: dict(row) for row in connection.execute("SELECT * FROM inbox")}

    def truths(self) -> dict[str, int]:
        """sample_id → label id."""
        if not self.database.exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return dict(connection.execute("SELECT sample_id, label_id FROM truths"))


def stub(address: str) -> tuple[edge_pb2_grpc.EdgeStub, grpc.Channel]:
    channel = grpc.insecure_channel(address)
    grpc.channel_ready_future(channel).result(10)
    return edge_pb2_grpc.EdgeStub(channel), channel


def request(*texts: str, ids: tuple[str, ...] = (), route: int = 0) -> edge_pb2.InferRequest:
    names = ids or ("",) * len(texts)
    return edge_pb2.InferRequest(
        samples=[
            edge_pb2.InferSample(sample_id=name, payload=sample_pb2.Payload(text=text), route=route)
            for name, text in zip(names, texts, strict=True)
        ]
    )


def feedback(*truths: tuple[str, str]) -> edge_pb2.FeedbackRequest:
    return edge_pb2.FeedbackRequest(truths=[edge_pb2.Truth(sample_id=name, label=label) for name, label in truths])


def until(condition: Callable[[], bool], seconds: float = 10.0, what: str = "") -> None:
    """Poll; fails loudly where it doesn't come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class Traffic:
    """Clients that send hard and easy samples one after the other, and remember every answer."""

    def __init__(self, address: str, clients: int = 4) -> None:
        self.answers: dict[str, int] = {}
        self.seconds: list[tuple[float, int]] = []
        self.failed: list[grpc.RpcError] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(address, k)) for k in range(clients)]

    def _run(self, address: str, client: int) -> None:
        made, channel = stub(address)
        with channel:
            turn = 0
            while not self._stop.is_set():
                turn += 1
                name = f"{client}-{turn}"
                began = time.monotonic()
                try:
                    reply = made.Infer(request(HARD[turn % 3] if turn % 2 else EASY[turn % 4], ids=(name,)), timeout=10)
                except grpc.RpcError as error:
                    self.failed.append(error)
                    continue
                self.seconds.append((time.monotonic() - began, reply.answers[0].source))
                self.answers[name] = reply.answers[0].source
                time.sleep(0.002)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def of(self, source: int) -> set[str]:
        return {name for name, got in self.answers.items() if got == source}


def depth(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return edge_pb2_grpc.EdgeStub(channel).Status(edge_pb2.StatusRequest(), timeout=5).spool_depth


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
