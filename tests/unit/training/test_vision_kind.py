"""Image classifiers as small models: features, fit, predictions, what is served, and what a run keeps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from vision_kit import LABELS, SMALL, image_split, image_task, tinted

from kcm.app.models import load_small_kind
from kcm.assets import cache_dir
from kcm.errors import ConfigError, DataError
from kcm.task import NetSpec, PreprocessSpec, Task
from training.fit import cross_fit, fit, one_hot
from training.program import labelled_examples, train_run
from training.run import load_run, save_run
from training.small import Examples, subset
from training.vision import frozen, load_vision
from training.vision.frozen import FrozenVision
from training.vision.kind import Vision, VisionModel, new_net

LITE = cache_dir() / "models" / "efficientnet-lite0"
needs_weights = pytest.mark.skipif(not LITE.is_dir(), reason="kcm fetch efficientnet-lite0")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return image_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def kind(task: Task) -> Vision:
    found = load_small_kind(task, quiet)
    assert isinstance(found, Vision)
    return found


@pytest.fixture(scope="module")
def examples(task: Task, kind: Vision) -> Examples:
    return labelled_examples(task, kind, image_split())


@pytest.fixture(scope="module")
def model(kind: Vision, examples: Examples) -> VisionModel:
    return kind.fit(examples)


def test_features_are_the_pixels_that_the_device_feeds_the_graph(kind: Vision) -> None:
    images, _ = tinted(300)
    features = kind.featurise(image_split(300).payloads)
    np.testing.assert_array_equal(features, images)
    np.testing.assert_array_equal(kind.take(features, np.array([5, 1])), images[[5, 1]])
    np.testing.assert_array_equal(kind.join(features[:2], features[7:8]), images[[0, 1, 7]])


def test_a_damaged_image_is_named(kind: Vision) -> None:
    with pytest.raises(DataError, match="image 1: the image is cut short"):
        kind.featurise([image_split(1).payloads[0], image_split(1).payloads[0][:200]])


def test_what_is_served_normalises_then_answers(model: VisionModel, examples: Examples) -> None:
    images = examples.features[:5]
    served = model.module()
    assert not served.training
    with torch.inference_mode():
        by_hand = torch.from_numpy((images - np.array(model.mean, np.float32)) / np.array(model.std, np.float32)).permute(0, 3, 1, 2)
        torch.testing.assert_close(served(torch.from_numpy(images)), model.net(by_hand))
    np.testing.assert_allclose(model.logits(images), served(torch.from_numpy(images)).detach().numpy(), atol=1e-4)
    assert model.logits(images[:0]).shape == (0, len(LABELS))


def test_batches_change_no_answer(model: VisionModel, kind: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.vision import kind as module

    images, _ = tinted(40)
    whole = kind.predict(model, images)
    assert not whole.length.any() and not whole.unknown.any()
    monkeypatch.setattr(module, "_BATCH_PIXELS", 7 * 32 * 32)
    np.testing.assert_allclose(model.logits(images), whole.logits, atol=1e-4)


def test_out_of_fold_predictions_are_by_models_that_had_not_seen_the_row(task: Task, kind: Vision, examples: Examples) -> None:
    """Random labels can be learnt by heart, not foretold."""
    random = np.random.default_rng(0).integers(0, len(LABELS), len(examples))
    made_up = Examples(examples.features, one_hot(random, len(LABELS)), examples.weights, examples.labelled, examples.reverse)
    right = cross_fit(task, kind, made_up).logits.argmax(1) == random
    assert right.mean() < 0.5
    honest = cross_fit(task, kind, examples).logits.argmax(1) == examples.targets.argmax(1)
    assert honest.mean() > 0.6


def test_a_run_keeps_the_model(task: Task, kind: Vision, tmp_path: Path) -> None:
    run = train_run(task, kind, image_split(48), None, seed=0, progress=quiet)
    save_run(tmp_path / "run", run)
    again = load_run(tmp_path / "run")
    images, _ = tinted(9, seed=3)
    assert isinstance(again.small, VisionModel)
    np.testing.assert_array_equal(again.small.logits(images), run.small.logits(images))
    assert list(again.payloads) == list(run.payloads)
    (tmp_path / "run" / "small.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="can't be read as the task's resnet"):
        load_run(tmp_path / "run")


def test_weights_of_another_net_are_refused(task: Task, model: VisionModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    wider = msgspec.structs.replace(task, small=msgspec.structs.replace(task.small, net=msgspec.structs.replace(task.small.net, width=8)))
    with pytest.raises(ConfigError, match="can't be read as the task's resnet"):
        VisionModel.load(tmp_path, wider)


def test_a_wrong_depth_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_vision(image_task(tmp_path, {**SMALL, "net": {"depth": 10}}))
    assert refused.value.fix == "depth = 8"


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_vision(image_task(tmp_path, {"kind": "efficientnet-lite", "net": {"weights": "nowhere", "frozen": True}}))


def test_progress_says_how_long_it_takes(task: Task, examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.vision import fit

    monkeypatch.setattr(fit, "_SAY", 0.0)
    said: list[str] = []
    Vision(task, said.append).fit(subset(Vision(task), examples, np.arange(32)))
    assert len(said) == 6 and said[-1].startswith("epoch 6 of 6: loss ") and said[-1].endswith("0 s left")


@pytest.mark.data
@pytest.mark.slow
@needs_weights
def test_a_frozen_net_goes_over_an_image_once_and_its_head_is_folded_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "cache"))
    weights = {"kind": "efficientnet-lite", "net": {"weights": str(LITE), "frozen": True}}
    task = image_task(tmp_path, weights, preprocess={"size": 64, "mean": [127, 127, 127], "std": [128, 128, 128]})
    kind = load_small_kind(task, quiet)
    assert isinstance(kind, FrozenVision)
    data = image_split(240, size=64)
    features = kind.featurise(data.payloads)
    passes: list[int] = []
    monkeypatch.setattr(frozen.Backbone, "_made", lambda self, payloads: passes.append(len(payloads)))
    np.testing.assert_array_equal(kind.featurise(data.payloads), features)  # read from disk
    assert not passes
    monkeypatch.undo()

    one = np.ones(200, np.float32)
    first = kind.fit(Examples(features[:200], one_hot(data.y[:200], 3), one, one > 0, one < 0))
    unseen = kind.predict(first, features[200:])
    assert (unseen.logits.argmax(1) == data.y[200:]).mean() > 0.5
    images, _ = tinted(240, size=64)
    np.testing.assert_allclose(first.logits(images[200:]), unseen.logits, atol=0.05)  # the cache keeps halves
    first.save(tmp_path)
    np.testing.assert_array_equal(VisionModel.load(tmp_path, task).logits(images[:3]), first.logits(images[:3]))


@pytest.mark.data
@pytest.mark.slow
@needs_weights
def test_imagenet_weights_are_where_a_whole_fit_begins(tmp_path: Path) -> None:
    net = {"weights": str(LITE), "epochs": 4, "batch": 16, "learning_rate": 0.02}
    task = image_task(tmp_path, {"kind": "efficientnet-lite", "net": net}, preprocess={"mean": [127] * 3, "std": [128] * 3})
    kind = load_small_kind(task, quiet)
    examples = labelled_examples(task, kind, image_split(96))
    model, unseen = kind.fit(examples), image_split(60, seed=1)
    assert (kind.predict(model, kind.featurise(unseen.payloads)).logits.argmax(1) == unseen.y).mean() > 0.5


def test_a_frozen_nets_head_does_not_depend_on_where_its_features_lie() -> None:
    """They are standardised while the head is fitted: other scales and offsets give the same answers."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    features = (random.normal(0, 1, (200, 12)) + 2 * np.eye(3, 12)[labels]).astype(np.float32)
    scale, offset = random.uniform(0.1, 5, 12).astype(np.float32), random.normal(0, 9, 12).astype(np.float32)
    one = np.ones(200, np.float32)
    logits = []
    for x in (features, features * scale + offset):
        weight, bias = frozen.fit_head(Examples(x, one_hot(labels, 3), one, one > 0, one < 0), NetSpec(balance="adjust"))
        logits.append(x @ weight.T + bias)
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05)
    assert (logits[0].argmax(1) == labels).mean() > 0.9


def test_the_seed_draws_the_first_weights() -> None:
    spec = NetSpec(depth=8, width=4)
    first, again, other = (new_net("resnet", spec, 3, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_bundle_names_weights_without_the_path_of_this_machine(tmp_path: Path) -> None:
    net = {"net": {"weights": "/home/me/nets/lite"}}
    shipped = image_task(tmp_path, {"kind": "efficientnet-lite", **net}, large={"kind": "efficientnet-lite", **net}).shipped()
    assert shipped["small"]["net"]["weights"] == shipped["large"]["net"]["weights"] == "lite"


def test_a_seed_draws_the_net(task: Task, kind: Vision, examples: Examples) -> None:
    few = subset(kind, examples, np.arange(64))
    nets = [fit(task, kind, few, seed=seed).small.net.state_dict() for seed in (0, 1, 1)]
    heads = [net["head.weight"] for net in nets]
    assert torch.equal(heads[1], heads[2]) and not torch.equal(heads[0], heads[1])


@needs_weights
def test_cached_features_are_of_one_way_to_read_an_image() -> None:
    plain = PreprocessSpec(kind="image", size=32)
    changed = [{}, {"size": 48}, {"resize": "squash"}, {"mean": (1.0, 2.0, 3.0)}, {"std": (1.0, 2.0, 3.0)}]
    specs = [msgspec.structs.replace(plain, **change) for change in changed]
    assert len({frozen.Backbone(NetSpec(), spec, ".")._key([b"an image"]) for spec in specs}) == len(specs)
