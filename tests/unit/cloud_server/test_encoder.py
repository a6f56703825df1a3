from __future__ import annotations

import json
from pathlib import Path

import cloud_kit
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from cloud_server.models import encoder as encoder_module
from cloud_server.models import load_large
from cloud_server.models.encoder import Encoder
from kcm.errors import ConfigError
from kcm.sample import Float32


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud_kit.tiny_bert(tmp_path_factory.mktemp("bert") / "weights")


def reference(folder: Path, texts: list[str], pairs: list[str | None], max_tokens: int) -> Float32:
    """One sentence at a time, no padding anywhere."""
    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()
    rows = []
    for text, pair in zip(texts, pairs, strict=True):
        inputs = tokenizer(text, pair, return_tensors="pt", truncation="longest_first", max_length=max_tokens) if pair else None
        inputs = inputs or tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0).numpy()
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def test_embed_equals_one_sentence_at_a_time(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*cloud_kit.TEXTS, "profit rose " * 40, ""]
    expected = reference(bert, texts, [None] * len(texts), 24)
    monkeypatch.setattr(encoder_module, "_BATCH_TOKENS", 60)  # several batches, padded ones among them
    got = Encoder(bert, 24).embed(texts)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-6)
    assert abs(expected[0] - expected[1]).max() > 0.01, "the tiny model must tell texts apart, else this proves nothing"


def test_embed_with_pairs_equals_one_at_a_time(bert: Path) -> None:
    texts, pairs = list(cloud_kit.TEXTS), ["a small model", None, "earn", None, "crude"]
    np.testing.assert_allclose(Encoder(bert, 24).embed(texts, pairs), reference(bert, texts, pairs, 24), atol=2e-6)


def test_a_text_does_not_depend_on_its_neighbours(bert: Path) -> None:
    encoder = Encoder(bert, 64)
    together = encoder.embed(cloud_kit.TEXTS)
    for row, text in enumerate(cloud_kit.TEXTS):
        np.testing.assert_allclose(encoder.embed([text])[0], together[row], atol=2e-6)


def test_no_texts_give_no_rows(bert: Path) -> None:
    assert Encoder(bert, 64).embed([]).shape == (0, 32)


def test_logits_are_the_head_over_the_embedding(tmp_path: Path) -> None:
    import safetensors.numpy

    model = load_large(cloud_kit.tiny_encoder(tmp_path, temperature=2.0))
    head = safetensors.numpy.load_file(str(tmp_path / "head.safetensors"))
    embedding = Encoder(tmp_path / "weights", 64).embed(cloud_kit.TEXTS)
    np.testing.assert_allclose(model.logits(cloud_kit.TEXTS, [None] * 5), (embedding @ head["weight"].T + head["bias"]) / 2.0, atol=1e-5)
    assert (model.teacher_id, model.prompt_id, model.reads_hints) == ("encoder-f00d", "none", False)


def test_a_hint_is_withheld_unless_the_head_was_fitted_with_hints(tmp_path: Path) -> None:
    never = load_large(cloud_kit.tiny_encoder(tmp_path / "a"))
    fitted = load_large(cloud_kit.tiny_encoder(tmp_path / "b", hint_dropout=0.5))
    text = [cloud_kit.TEXTS[0]]
    np.testing.assert_array_equal(never.logits(text, [cloud_kit.HINT]), never.logits(text, [None]))
    assert fitted.reads_hints and fitted.prompt_id != "none"
    np.testing.assert_array_equal(fitted.logits(text, [None]), never.logits(text, [None]))
    assert abs(fitted.logits(text, [cloud_kit.HINT]) - fitted.logits(text, [None])).max() > 0.01
    expected = Encoder(tmp_path / "b" / "weights", 64).embed(text, ["A small model suggests: earn, crude oil."])
    import safetensors.numpy

    head = safetensors.numpy.load_file(str(tmp_path / "b" / "head.safetensors"))
    np.testing.assert_allclose(fitted.logits(text, [cloud_kit.HINT]), expected @ head["weight"].T + head["bias"], atol=1e-5)


def test_a_head_of_other_labels_is_refused(tmp_path: Path) -> None:
    folder = cloud_kit.tiny_encoder(tmp_path)
    cloud_kit.write_large(folder, "encoder", "weights", dimension=16)
    with pytest.raises(ConfigError, match=r"weight \(4, 16\).*4 labels and embeddings of 32"):
        load_large(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(ConfigError, match="can't be read as a head"):
        load_large(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = cloud_kit.tiny_encoder(tmp_path)
    (folder / "weights" / "model.safetensors").rename(folder / "weights" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        load_large(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"kind": "forest"}, "kind"),
        ({"temperature": 0.0}, "temperature"),
        ({"labels": ["one"]}, "at least two"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_large_json_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = cloud_kit.write_large(tmp_path, "encoder", "weights")
    path = folder / "large.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_large(folder)


def test_a_folder_without_large_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"large\.json can't be read"):
        load_large(tmp_path)


@pytest.mark.slow
def test_minilm_embeds_as_one_sentence_at_a_time() -> None:
    folder = cloud_kit.real_model("minilm")
    texts = [*cloud_kit.TEXTS, "profit rose " * 100]
    np.testing.assert_allclose(Encoder(folder, 128).embed(texts), reference(folder, texts, [None] * len(texts), 128), atol=1e-5)
