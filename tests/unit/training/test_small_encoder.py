from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cloud_kit
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from small_kit import LABELS, split, task_of, through
from transformers import AutoModel, AutoTokenizer

from kcm.app.models import load_small_kind
from kcm.errors import ConfigError
from kcm.sample import Source
from kcm.task import Task
from training.data import Split
from training.encoder import Encoder, EncoderHead
from training.fit import one_hot
from training.program import train_run
from training.run import load_run, save_run
from training.small import Examples

PREPROCESS = {"kind": "tokenizer", "max_tokens": 24}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud_kit.tiny_bert(tmp_path_factory.mktemp("bert") / "weights")


@pytest.fixture
def task(bert: Path, tmp_path: Path) -> Task:
    """A task whose encoder lies beside it, free to be damaged."""
    shutil.copytree(bert, tmp_path / "encoder")
    return task_of(tmp_path, {"kind": "encoder", "path": "encoder"}, PREPROCESS)


def embedded(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """transformers itself, one text at a time: the mean of the last hidden states, to unit length."""
    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=PREPROCESS["max_tokens"])
            mean = model(**inputs).last_hidden_state[0].mean(0).numpy()
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def examples_of(kind: Encoder, data: Split, **changes: Any) -> Examples:
    ones = np.ones(len(data), np.float32)
    parts: dict[str, Any] = {"targets": one_hot(data.y, len(LABELS)), "weights": ones, "labelled": ones > 0, "reverse": ones < 0}
    return Examples(features=kind.featurise(data.payloads), **(parts | changes))


def test_an_encoder_goes_all_the_way_to_the_edge(task: Task, tmp_path: Path) -> None:
    data = split()
    journey = through(task, load_small_kind(task, lambda _: None), tmp_path, data)
    head = journey.run.small
    expected = embedded(tmp_path / "encoder", data.payloads) @ head.weight + head.bias
    assert [answer.label_id for answer in journey.answers] == expected.argmax(1).tolist()
    assert np.mean(expected.argmax(1) == data.y) > 0.7, "the head learnt nothing"
    assert journey.report.labels == 0 and journey.report.decisions == journey.report.excused
    assert journey.bundle.files["tokenizer.json"] == (tmp_path / "encoder" / "tokenizer.json").read_bytes()
    assert {answer.source for answer in journey.answers} <= {Source.LOCAL, Source.DEGRADED}


def test_features_are_those_of_each_text_alone(task: Task, tmp_path: Path) -> None:
    kind = Encoder(task)
    texts = [*cloud_kit.TEXTS, "profit rose " * 40, "", "ß"]
    features = kind.featurise(texts)
    np.testing.assert_allclose(features.vectors, embedded(tmp_path / "encoder", texts), atol=2e-5)
    tokens = [len(kind.preprocessor.batch([text])["input_ids"][0]) for text in texts]
    assert features.length.tolist() == tokens and features.length.max() == PREPROCESS["max_tokens"]
    assert features.unknown[:-1].max() == 0 and features.unknown[-1] == pytest.approx(1 / 3)  # [CLS] [UNK] [SEP]
    order = np.array([3, 0, 2])
    joined = kind.join(kind.take(features, order), kind.featurise(["year"]))
    np.testing.assert_allclose(joined.vectors, features.vectors[[3, 0, 2, 4]], atol=2e-5)
    assert joined.length.tolist() == [tokens[i] for i in (3, 0, 2, 4)] and len(joined.unknown) == 4


def test_the_head_learns_from_soft_targets_weights_and_direction(task: Task) -> None:
    kind, data = Encoder(task), split()
    right = one_hot(data.y, len(LABELS))
    soft = (0.6 * right + 0.4 / len(LABELS)).astype(np.float32)
    models = {
        "hard": kind.fit(examples_of(kind, data)),
        "soft": kind.fit(examples_of(kind, data, targets=soft)),
        "reverse": kind.fit(examples_of(kind, data, targets=soft, reverse=np.ones(len(data), bool))),
    }
    features = kind.featurise(data.payloads)
    largest = {name: np.abs(kind.predict(model, features).logits).mean() for name, model in models.items()}
    assert largest["soft"] < 0.7 * largest["hard"]
    assert np.abs(models["reverse"].weight - models["soft"].weight).max() > 1e-2
    # Rows that weigh nothing count for nothing, however wrong.
    twice = Split("train", data.payloads * 2, np.concatenate([data.y, (data.y + 1) % len(LABELS)]))
    weights = np.repeat(np.array([1, 0], np.float32), len(data))
    without = kind.predict(kind.fit(examples_of(kind, twice, weights=weights)), features).logits
    np.testing.assert_allclose(without, kind.predict(models["hard"], features).logits, atol=5e-2)


def test_a_run_holds_its_encoder_to_the_hash(task: Task, tmp_path: Path) -> None:
    kind, data = Encoder(task), split()
    made = train_run(task, kind, data, None, seed=0, progress=lambda _: None)
    save_run(tmp_path / "run", made)
    loaded = load_run(tmp_path / "run").small
    assert isinstance(loaded, EncoderHead)
    assert np.array_equal(loaded.weight, made.small.weight) and np.array_equal(loaded.bias, made.small.bias)
    weights = tmp_path / "encoder" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"is not the one that .* was trained on"):
        load_run(tmp_path / "run")
    weights.write_bytes(original)
    load_run(tmp_path / "run")
    (tmp_path / "run" / "small.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="can't be read as an encoder's head"):
        load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "encoder")
    with pytest.raises(ConfigError):
        load_run(tmp_path / "run")


def test_settings_that_can_not_work_say_what_to_set(bert: Path, tmp_path: Path) -> None:
    small = {"kind": "encoder", "path": str(bert)}
    for changed, preprocess, said in (
        (small, {}, 'small kind "encoder" reads "tokenizer"'),
        ({"kind": "encoder"}, PREPROCESS, "needs a path"),
        ({"kind": "encoder", "path": "nowhere"}, PREPROCESS, "is not at"),
        (small, {**PREPROCESS, "tokenizer": "tokenizer.json"}, "brings its own"),
        (small, {**PREPROCESS, "max_tokens": 129}, "can't read 129 tokens"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_small_kind(task_of(tmp_path, changed, preprocess), lambda _: None)


def test_a_folder_that_lacks_something_is_refused(task: Task, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    tokenizer = (folder / "tokenizer.json").read_text()
    grown = json.loads(tokenizer)
    grown["model"]["vocab"]["extra"] = len(grown["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(grown))
    with pytest.raises(ConfigError, match=r"tokenizer\.json has \d+ tokens, the encoder"):
        Encoder(task)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Encoder(task)
    (folder / "tokenizer.json").write_text(tokenizer)

    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layer.1.attention" not in name}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="lack 10 of the encoder's weights"):
        Encoder(task)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="can't be loaded as an encoder"):
        Encoder(task)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no safetensors file"):
        Encoder(task)


@pytest.mark.slow
def test_the_real_minilm_goes_all_the_way_to_the_edge(tmp_path: Path) -> None:
    folder = cloud_kit.real_model("minilm")
    task = task_of(tmp_path, {"kind": "encoder", "path": "minilm"}, {"kind": "tokenizer", "max_tokens": 64})
    data = split()
    journey = through(task, load_small_kind(task, lambda _: None), tmp_path, data)
    assert np.mean([answer.label_id == y for answer, y in zip(journey.answers, data.y, strict=True)]) > 0.8
    assert journey.report.labels == 0 and journey.report.logits_error < 1e-4
    assert journey.bundle.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
