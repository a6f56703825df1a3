"""What the cloud's tests share: small real models with random weights, a task, requests, and a real `kcm cloud` process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest

import kcm.task
from cloud_server.store import Row, TeacherStore
from kcm.assets import cache_dir
from kcm.sample import Float32, Hint, HintArm, Payload, payload_to_proto, scores_to_proto
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc, sample_pb2

LABELS = ("acq", "crude oil", "crude steel", "earn")
SPACE = kcm.task.label_space(LABELS)
WORDS = [
    "the",
    "a",
    "of",
    "profit",
    "rose",
    "fell",
    "oil",
    "steel",
    "barrel",
    "share",
    "merger",
    "quarter",
    "company",
    "price",
    "ton",
    "said",
    "year",
    "more",
    "less",
    "acq",
    "crude",
    "earn",
    "small",
    "model",
]
TEXTS = (
    "profit rose",
    "the company said the price of oil fell a barrel",
    "merger",
    "a share of the steel price rose more than oil said the company of the quarter",
    "year",
)
HINT = Hint(label_ids=(3, 1), probabilities=(0.6, 0.3), confidence=0.4)


def real_model(name: str) -> Path:
    """The fetched model's folder, or skip."""
    folder = cache_dir() / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not fetched: kcm fetch {name}")
    return folder


def tiny_bert(folder: Path) -> Path:
    """A two-layer BERT with random weights and a WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz.,:",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    vocabulary = list(dict.fromkeys(vocabulary))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
    )
    # Weights far larger than a fresh model's: else all texts look alike and no test could tell them apart.
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def tiny_llama(folder: Path) -> Path:
    """A two-layer Llama with random weights and a byte-level BPE tokenizer that has special tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *TEXTS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>").save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder), safe_serialization=True)
    return folder


def write_large(folder: Path, kind: str, model: str | Path, dimension: int = 32, **changes: Any) -> Path:
    """A large model's folder as training writes it; the encoder's head is random."""
    import safetensors.numpy

    folder.mkdir(parents=True, exist_ok=True)
    large = {
        "schema": 1,
        "kind": kind,
        "model": str(model),
        "labels": list(LABELS),
        "task_id": "toy",
        "max_tokens": 64,
        "large_id": "f00d",
        **changes,
    }
    (folder / "large.json").write_text(json.dumps(large))
    if kind == "encoder":
        rng = np.random.default_rng(0)
        head = {
            "weight": rng.normal(size=(len(large["labels"]), dimension)).astype("f4"),
            "bias": rng.normal(size=len(large["labels"])).astype("f4"),
        }
        safetensors.numpy.save_file(head, str(folder / "head.safetensors"))
    return folder


def write_task(folder: Path, labels: Sequence[str] = LABELS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.toml").write_text(f'[task]\nid = "toy"\nlabels = {json.dumps(list(labels))}\n')
    return folder / "task.toml"


def tiny_encoder(folder: Path, **changes: Any) -> Path:
    """An encoder's large folder with its weights inside."""
    tiny_bert(folder / "weights")
    return write_large(folder, "encoder", "weights", **changes)


class RuleModel:
    """A large model that needs no weights: scores follow from the payload's bytes and the hint. Counts, and can be slowed down."""

    teacher_id, prompt_id, reads_hints, labels = "rule", "prompt", True, LABELS
    scores_kind = sample_pb2.Scores.LOGIT

    def __init__(self, seconds_each: float = 0.0) -> None:
        self.seconds_each = seconds_each
        self.calls: list[tuple[Payload, Hint | None]] = []
        self.batches: list[int] = []
        self.hold: threading.Event | None = None

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        self.calls += list(zip(samples, hints, strict=True))
        self.batches.append(len(samples))
        if self.hold is not None:
            self.hold.wait(30)
        time.sleep(self.seconds_each * len(samples))
        if any(isinstance(sample, str) and "explode" in sample for sample in samples):
            raise RuntimeError("secret payload in the message")
        return np.stack([self.row(sample, hint) for sample, hint in zip(samples, hints, strict=True)])

    @staticmethod
    def row(payload: Payload, hint: Hint | None = None) -> Float32:
        seed = [*(payload.encode() if isinstance(payload, str) else payload), *(hint.label_ids if hint else ())]
        return np.random.default_rng(seed).normal(size=len(LABELS)).astype(np.float32)


def sample(
    sample_id: str, payload: Payload = "profit rose", *, hint: Hint | None = None, small: Float32 | None = None, **changes: Any
) -> cloud_pb2.PredictSample:
    message = cloud_pb2.PredictSample(
        sample_id=sample_id, purpose=cloud_pb2.LIVE, p_escalate=1.0, confidence=0.5, bundle_id="b0", payload=payload_to_proto(payload)
    )
    if hint is not None:
        message.hint.CopyFrom(hint.to_proto())
    if small is not None:
        message.small.CopyFrom(scores_to_proto(small, SPACE))
    for name, value in changes.items():
        message.ClearField(name) if value is None else setattr(message, name, value)
    return message


def request(
    *samples: cloud_pb2.PredictSample, edge_id: str = "edge-1", task_id: str = "toy", label_space: str = SPACE
) -> cloud_pb2.PredictRequest:
    return cloud_pb2.PredictRequest(edge_id=edge_id, task_id=task_id, label_space=label_space, samples=samples)


def labels_request(edge_id: str = "edge-1", task_id: str = "toy", label_space: str = SPACE, **labels: int) -> cloud_pb2.LabelRequest:
    """Of sample id → label id."""
    truths = [cloud_pb2.TrueLabel(sample_id=name, label_id=label) for name, label in labels.items()]
    return cloud_pb2.LabelRequest(edge_id=edge_id, task_id=task_id, label_space=label_space, labels=truths)


def row(sample_id: str, edge_id: str = "edge-1", text: Payload = "profit rose", **changes: Any) -> Row:
    made = Row(
        edge_id=edge_id,
        sample_id=sample_id,
        purpose=1,
        p_escalate=1.0,
        p_hint=0.0,
        task_id="toy",
        label_space=SPACE,
        bundle_id="b0",
        payload=text,
        confidence=0.5,
        small_logits=None,
        answer_logits=RuleModel.row((text if isinstance(text, str) else text.hex()) + sample_id),
        hint_arm=HintArm.NONE,
        teacher_id="rule",
        prompt_id="prompt",
    )
    return msgspec.structs.replace(made, **changes)


def put(root: Path, *rows: Row, replica: str = "0") -> None:
    store = TeacherStore(root, replica)
    store.commit(rows).result()
    store.close()


def tell(root: Path, labels: Mapping[str, int], *, edge_id: str = "edge-1", label_space: str = SPACE, replica: str = "0") -> None:
    """Commit truths: sample id → label id."""
    store = TeacherStore(root, replica)
    store.tell(edge_id, label_space, labels).result()
    store.close()


# Makes a `kcm cloud` process answer by rule: it starts in a second, and its speed is known.
BY_RULE = """
import sys; sys.path.insert(0, {tests!r})
import cloud_kit, cloud_server.server
cloud_server.server.load_model = lambda config: cloud_kit.RuleModel({seconds_each})
"""


def by_rule(seconds_each: float = 0.0) -> str:
    return BY_RULE.format(tests=str(Path(__file__).parent), seconds_each=seconds_each)


class CloudProcess:
    """A `kcm cloud` process. `code` replaces the plain start, for mutants that a test must catch."""

    def __init__(self, task: Path, large: Path, store: Path, *flags: str, code: str = "", environ: Mapping[str, str] | None = None) -> None:
        start = code + "\nfrom kcm.app.cli import main; main()"
        command = [
            sys.executable,
            "-c",
            start,
            "cloud",
            "--task",
            str(task),
            "--large",
            str(large),
            "--store",
            str(store),
            "--listen",
            "127.0.0.1:0",
            "--json",
        ]
        self.log = store.parent / f"cloud-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environ or {})},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"kcm cloud ended: {self.log.read_text()[-3000:]}"
        ready = json.loads(line)
        assert "ready" in ready, ready
        self.address, self.metrics = ready["ready"], ready["metrics"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 20.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def cloud_process(*args: Any, **kwargs: Any) -> Iterator[CloudProcess]:
    started = CloudProcess(*args, **kwargs)
    try:
        yield started
    finally:
        started.end()


@contextlib.contextmanager
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield cloud_pb2_grpc.CloudStub(channel)


def stored_keys(store: Path) -> list[tuple[str, str]]:
    """Every row's key over all parts, repeats and all."""
    import pyarrow.parquet as pq

    keys: list[tuple[str, str]] = []
    for part in sorted((store / "parquet").glob("*.parquet")):
        table = pq.read_table(part, columns=["edge_id", "sample_id"])
        keys += zip(table["edge_id"].to_pylist(), table["sample_id"].to_pylist(), strict=True)
    return keys


def stored_labels(store: Path) -> dict[str, int | None]:
    """sample_id → label over all parts, of stores in which one edge wrote."""
    import pyarrow.parquet as pq

    labels: dict[str, int | None] = {}
    for part in sorted((store / "parquet").glob("*.parquet")):
        table = pq.read_table(part, columns=["sample_id", "label"])
        labels.update(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    return labels


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
