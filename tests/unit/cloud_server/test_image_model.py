"""Image models with real ONNX graphs, written here: logits, fusion with a hint, and what is refused when they are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import image_kit
import numpy as np
import pytest
from cloud_kit import HINT, LABELS
from onnx import TensorProto
from picture_kit import COLOURS, GREY, MEAN, SIZE, STD, colour_graph, expected, flat, noisy, write_image_large

from cloud_server.models import ReadsAhead, load_large, read_large
from cloud_server.models.image import ImageModel
from kcm.errors import ConfigError
from kcm.fusion import FLOOR, fuse, log_prior
from kcm.images import ImagePreprocessor
from kcm.sample import Hint, Payload
from protos.kcm.v1 import sample_pb2

PAYLOADS: list[Payload] = [*map(flat, COLOURS), flat(GREY), noisy(0), noisy(1)]
NONE: Sequence[Hint | None] = [None] * len(PAYLOADS)


def load(folder: Path, graph: bytes | None = None, **changes: Any) -> ImageModel:
    model = load_large(write_image_large(folder, graph, **changes))
    assert isinstance(model, ImageModel)
    return model


def pixels() -> Any:
    return ImagePreprocessor(read_spec()).batch(PAYLOADS)["image"]


def read_spec() -> Any:
    from picture_kit import image_task

    return image_task().preprocess


def log_softmax(values: Any) -> Any:
    shifted = values - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_scores_are_the_graphs_logits_at_the_temperature(tmp_path: Path) -> None:
    model = load(tmp_path)
    found = model.logits(PAYLOADS, NONE)
    np.testing.assert_allclose(found, log_softmax(expected(pixels()) / 1.5), atol=1e-4)
    assert found.argmax(1)[:4].tolist() == [0, 1, 2, 3]
    assert (model.teacher_id, model.labels, model.scores_kind) == ("resnet-f00d", LABELS, sample_pb2.Scores.LOGIT)
    assert model.provider == "CPUExecutionProvider" and isinstance(model, ReadsAhead)
    assert model.logits([], []).shape == (0, 4)


def test_a_hint_is_a_prior_with_the_fitted_weight(tmp_path: Path) -> None:
    model = load(tmp_path)
    plain, hinted = model.logits(PAYLOADS, NONE), model.logits(PAYLOADS, [HINT] * len(PAYLOADS))
    p_hint = np.array([0.05, 0.3, 0.05, 0.6])  # HINT: label 3 with 0.6, label 1 with 0.3; the rest even
    np.testing.assert_allclose(hinted - plain, np.tile(0.7 * np.log(p_hint), (len(PAYLOADS), 1)), atol=1e-5)


def test_each_row_gets_its_own_hint(tmp_path: Path) -> None:
    model = load(tmp_path)
    hints: list[Hint | None] = [HINT, None, Hint(label_ids=(2,), probabilities=(0.9,), confidence=0.5)]
    mixed = model.logits(PAYLOADS[:3], hints)
    for row, hint in enumerate(hints):
        np.testing.assert_allclose(mixed[row], model.logits([PAYLOADS[row]], [hint])[0], atol=1e-5)


def test_a_model_without_a_weight_reads_no_hints(tmp_path: Path) -> None:
    model = load(tmp_path, hint_weight=0.0)
    assert not model.reads_hints and model.prompt_id == "none"
    np.testing.assert_array_equal(model.logits(PAYLOADS, [HINT] * len(PAYLOADS)), model.logits(PAYLOADS, NONE))


def test_the_prompt_id_names_the_fusion(tmp_path: Path) -> None:
    ids = {
        load(tmp_path / f"{weight}-{temperature}", hint_weight=weight, temperature=temperature).prompt_id
        for weight in (0.5, 0.6)
        for temperature in (1.0, 1.1)
    }
    assert len(ids) == 4
    assert load(tmp_path / "again", hint_weight=0.5, temperature=1.0).prompt_id in ids


def test_thousands_of_images_are_asked_in_runs_that_bound_memory(tmp_path: Path) -> None:
    model = load(tmp_path)
    many = [noisy(seed) for seed in range(70)]
    together = model.logits(many, [None] * 70)
    alone = np.concatenate([model.logits([payload], [None]) for payload in many])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_reading_and_scoring_apart_is_the_same(tmp_path: Path) -> None:
    model = load(tmp_path)
    ready = [model.read(payload) for payload in PAYLOADS]
    assert {(item.shape, item.dtype.name) for item in ready} == {((SIZE, SIZE, 3), "uint8")}
    np.testing.assert_array_equal(model.scores(ready, NONE), model.logits(PAYLOADS, NONE))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("a text", "the payload is text"),
        (b"GIF89a" + bytes(40), "GIF: JPEG and PNG are read"),
        (noisy(0)[:-200], "cut short"),
        (image_kit.jpeg(image_kit.scene(200, 200))[:2000], "cut short"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, payload: Payload, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path).read(payload)


def test_the_models_own_limits_hold(tmp_path: Path) -> None:
    preprocess = {"kind": "image", "size": SIZE, "max_pixels": 2000, "max_bytes": 3000}
    model = load(tmp_path, preprocess=preprocess)
    with pytest.raises(ValueError, match="at most 2000 pixels"):
        model.read(flat(GREY, 100))
    with pytest.raises(ValueError, match="at most 3000 are taken"):
        model.read(flat(GREY) + bytes(4000))


@pytest.mark.parametrize(("layout", "size"), [("first", SIZE), ("first", "side"), ("last", SIZE)])
@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_users_graph_of_normalised_floats_is_fed_what_it_reads(tmp_path: Path, layout: str, element: int, size: int | str) -> None:
    graph = colour_graph(element=element, layout=layout, size=size, name="pixel_values", output="scores")
    model = load(tmp_path, graph, kind="onnx", hint_weight=0.0, temperature=1.0)
    tolerance = 1e-4 if element == TensorProto.FLOAT else 2e-2
    np.testing.assert_allclose(model.logits(PAYLOADS, NONE), log_softmax(expected(pixels())), atol=tolerance)
    assert model.teacher_id == "onnx-f00d"


def test_a_users_graph_may_read_bytes_with_channels_first(tmp_path: Path) -> None:
    model = load(tmp_path, colour_graph(layout="first", name="pixels"), kind="onnx", temperature=1.0)
    np.testing.assert_allclose(model.logits(PAYLOADS, NONE), log_softmax(expected(pixels())), atol=1e-4)


@pytest.mark.parametrize(("element", "layout"), [(TensorProto.UINT8, "last"), (TensorProto.FLOAT, "first")])
def test_where_a_shape_says_nothing_bytes_are_read_as_files_hold_them_and_floats_as_torch_does(
    tmp_path: Path, element: int, layout: str
) -> None:
    graph = colour_graph(element=element, layout=layout, size="side", channels="colours", name="pixels")
    model = load(tmp_path, graph, kind="onnx", temperature=1.0)
    np.testing.assert_allclose(model.logits(PAYLOADS, NONE), log_softmax(expected(pixels())), atol=1e-4)


@pytest.mark.parametrize(
    ("graph", "changes", "message"),
    [
        ({"name": "pixels"}, {}, "reads pixels; an image model reads one input 'image'"),
        ({"element": TensorProto.FLOAT}, {}, r"input 'image' is tensor\(float\)"),
        ({"layout": "first"}, {}, r"not uint8 \[B, 16, 16, 3\]"),
        ({"element": TensorProto.INT64}, {"kind": "onnx"}, r"tensor\(int64\)"),
        ({"size": 24}, {}, "24"),
        ({"size": 24}, {"kind": "onnx"}, "24"),
        ({"batch": 1}, {}, r"takes 1 image\(s\) at a time"),
        ({"output": "scores"}, {}, "has no output 'logits', only 'scores'"),
        ({"classes": 5}, {}, r"gives \[2, 5\] for two images, the model has 4 labels"),
        ({"end": "Log"}, {}, "not finite"),
        ({"end": "Softmax"}, {}, "gives probabilities, not logits"),
        ({"mixes_rows": True}, {}, "change by .* beside another image"),
        ({"external": "other.bin"}, {}, "can't be loaded by ONNX Runtime"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused_when_it_is_loaded(
    tmp_path: Path, graph: dict[str, Any], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.bin").write_bytes(bytes(4 * 3 * 4))  # it is there, and must not be read
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, colour_graph(**graph), **changes)


def test_a_folder_that_lacks_or_garbles_its_graph_is_refused(tmp_path: Path) -> None:
    folder = write_image_large(tmp_path, b"no graph")
    with pytest.raises(ConfigError, match=r"large\.onnx can't be loaded"):
        load_large(folder)
    (folder / "large.onnx").unlink()
    with pytest.raises(ConfigError, match=r"large\.onnx can't be read") as caught:
        load_large(folder)
    assert "kcm train-large" in caught.value.fix


def test_large_json_says_how_an_image_is_read(tmp_path: Path) -> None:
    large = read_large(write_image_large(tmp_path))
    assert (large.modality, large.preprocess.size, large.preprocess.mean, large.preprocess.std) == ("image", SIZE, MEAN, STD)
    written = json.loads((tmp_path / "large.json").read_text())
    (tmp_path / "large.json").write_text(json.dumps({**written, "preprocess": {"kind": "ngrams"}}))
    with pytest.raises(ConfigError, match="needs"):
        read_large(tmp_path)
    for name, value in (("hint_weight", -0.1), ("temperature", 0.0), ("kind", "vgg")):
        (tmp_path / "large.json").write_text(json.dumps({**written, name: value}))
        with pytest.raises(ConfigError, match=name):
            read_large(tmp_path)


def _loaded_without(folder: Path, *modules: str) -> str:
    """What a fresh process says that can't import `modules`."""
    program = (
        f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
        "from pathlib import Path; from cloud_server.models import load_large; from kcm.errors import KcmError\n"
        f"try: print(load_large(Path({str(folder)!r})).teacher_id)\nexcept KcmError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_image_model_needs_onnx_runtime_and_pillow_and_no_torch(tmp_path: Path) -> None:
    folder = write_image_large(tmp_path)
    assert _loaded_without(folder, "torch", "transformers", "safetensors", "onnx") == "resnet-f00d\n"
    assert _loaded_without(folder, "onnxruntime") == "onnxruntime is not installed\n  fix: pip install 'kcm[cpu]'\n"
    assert _loaded_without(folder, "PIL") == "PIL is not installed\n  fix: pip install 'kcm[cloud]'\n"


def test_a_prior_spreads_what_the_hint_leaves_and_rules_nothing_out() -> None:
    certain = Hint(label_ids=(1,), probabilities=(1.0,), confidence=0.9)
    doubtful = Hint(label_ids=(0, 2), probabilities=(0.5, 0.2), confidence=0.4)
    empty = Hint(label_ids=(), probabilities=(), confidence=0.4)
    prior = np.exp(log_prior([certain, doubtful, None, empty], 5))
    np.testing.assert_allclose(prior[:2].sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(prior[0], np.array([FLOOR, 1, FLOOR, FLOOR, FLOOR]) / (1 + 4 * FLOOR), rtol=1e-5)
    np.testing.assert_allclose(prior[1], [0.5, 0.1, 0.2, 0.1, 0.1], rtol=1e-5)
    np.testing.assert_array_equal(prior[2:], 1.0)


@pytest.mark.parametrize(
    "odd",
    [
        Hint(label_ids=(0, 1, 2), probabilities=(1.0, 1.0, 1.0), confidence=0.5),  # more than all
        Hint(label_ids=(1, 1), probabilities=(0.3, 0.6), confidence=0.5),
        Hint(label_ids=(0, 1, 2), probabilities=(0.0, 0.0, 0.0), confidence=0.0),
        Hint(label_ids=(0, 1, 2), probabilities=(0.2, 0.3, 0.5), confidence=0.0),  # every class is named
    ],
)
def test_odd_hints_of_a_device_give_a_finite_prior(odd: Hint) -> None:
    prior = log_prior([odd], 3)
    assert np.isfinite(prior).all()
    np.testing.assert_allclose(np.exp(prior).sum(1), 1.0, rtol=1e-6)


def test_fusion_is_stable_for_large_logits_and_a_weight_of_zero_changes_nothing() -> None:
    logits = np.array([[1000.0, 999.0, -1000.0]], np.float32)
    prior = log_prior([Hint(label_ids=(1,), probabilities=(0.8,), confidence=0.5)], 3)
    plain = fuse(logits, prior, temperature=1.0, weight=0.0)
    np.testing.assert_allclose(plain, log_softmax(logits.astype(np.float64)), atol=1e-4)
    fused = fuse(logits, prior, temperature=1.0, weight=1.0)
    assert np.isfinite(fused).all() and fused.argmax() == 1, "0.8 against 0.1 outweighs e¹"
