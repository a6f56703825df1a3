"""The large image model: what it is fitted on, what its temperature and hint weight are fitted on, and what the cloud then serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from vision_kit import LABELS, image_split, image_task, tinted

from cloud_server.models import load_large, read_large
from kcm.app.models import LargeInProcess
from kcm.assets import cache_dir
from kcm.errors import ConfigError, DataError
from kcm.fusion import fuse, log_prior
from kcm.sample import Hint
from kcm.task import Task
from training.data import Split
from training.vision import checkpoint
from training.vision.large import FittedLarge, KeptBack, check_large, fit_hint_weight, fit_large, fit_temperature, large_preprocess

LITE = cache_dir() / "models" / "efficientnet-lite0"
NET = {"depth": 8, "width": 8, "epochs": 5, "batch": 16}


def quiet(_: str) -> None:
    pass


def task_of(root: Path, kind: str = "resnet", **net: object) -> Task:
    return image_task(root, large={"kind": kind, "net": {**NET, **net}})


def made_up(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> FittedLarge:
    shift = np.zeros(logits.shape[1], np.float32)
    return FittedLarge(None, None, np.arange(len(labels)), logits, labels, shift, temperature)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["resnet", "bbn"])
def test_a_stratified_tenth_is_kept_back(tmp_path: Path, kind: str) -> None:
    data = image_split(120)
    fitted = fit_large(task_of(tmp_path, kind), data, quiet)
    assert len(fitted.kept_back) == 12
    np.testing.assert_array_equal(np.bincount(data.y[fitted.kept_back]), [4, 4, 4])
    images, _ = tinted(120)
    np.testing.assert_array_equal(fitted.logits, fitted.model.logits(images[fitted.kept_back]))
    unseen, truth = tinted(90, seed=1)
    assert (fitted.model.logits(unseen).argmax(1) == truth).mean() > 0.7


def test_rows_kept_back_are_not_fitted_on(tmp_path: Path) -> None:
    """Other images there change nothing in the net."""
    task, data = task_of(tmp_path, epochs=2), image_split(60)
    first = fit_large(task, data, quiet)
    payloads, others = list(data.payloads), image_split(60, seed=5).payloads
    for row in first.kept_back:
        payloads[row] = others[row]
    second = fit_large(task, Split("train", payloads, data.y), quiet)
    images, _ = tinted(20, seed=1)
    np.testing.assert_array_equal(second.model.logits(images), first.model.logits(images))
    assert np.abs(second.logits - first.logits).max() > 0.1


def test_a_cut_fit_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "cache"))
    task, data = task_of(tmp_path), image_split(60)
    whole = fit_large(task, data, quiet)
    assert not list((tmp_path / "cache" / "unfinished").glob("*"))  # nothing is left of a fit that ended
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    keep = checkpoint.Checkpoint.keep

    def cut(self: checkpoint.Checkpoint, net: object, optimiser: object, epochs: int) -> None:
        keep(self, net, optimiser, epochs)  # type: ignore[arg-type]
        if epochs == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "keep", cut)
    with pytest.raises(KeyboardInterrupt):
        fit_large(task, data, quiet)
    monkeypatch.setattr(checkpoint.Checkpoint, "keep", keep)
    starts: list[int] = []
    resume = checkpoint.Checkpoint.resume
    monkeypatch.setattr(checkpoint.Checkpoint, "resume", lambda self, *a: starts.append(resume(self, *a)) or starts[-1])  # type: ignore[func-returns-value]
    again = fit_large(task, data, quiet)
    assert starts == [3]
    np.testing.assert_array_equal(again.logits, whole.logits)
    assert not list((tmp_path / "cache" / "unfinished").glob("*"))


def test_temperature_is_found_under_a_long_tail() -> None:
    """Logits of a balanced world, three times too large, seen on labels of which 80 % are of one class."""
    rng = np.random.default_rng(0)
    prior = np.array([0.8, 0.15, 0.05])
    labels = rng.choice(3, 8000, p=prior)
    x = rng.normal(0, 1, (8000, 3)) + 0.5 * np.eye(3)[labels]  # class-conditional Gaussians: 0.5 · x are balanced logits
    logits = (3 * 0.5 * x).astype(np.float32)

    def nll(t: float) -> float:
        z = logits / t + np.log(prior)
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(8000), labels]).mean())

    found = fit_temperature(logits, labels, np.log(prior).astype(np.float32))
    assert found == pytest.approx(3, rel=0.05)
    grid = np.linspace(2.8, 3.1, 301)
    assert found == pytest.approx(grid[np.argmin([nll(t) for t in grid])], abs=0.01)  # 2.94; without the prior 2.88


def test_a_hint_weighs_what_it_is_worth() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 6000)

    def independent(strength: float) -> np.ndarray:
        return (strength * (rng.normal(0, 1, (6000, 4)) + strength * np.eye(4)[labels])).astype(np.float32)

    large, small = independent(1.5), independent(1.0)
    log_p = small - np.log(np.exp(small).sum(1, keepdims=True))
    assert fit_hint_weight(made_up(large, labels), [log_p]) == pytest.approx(1, abs=0.1)  # errors are independent given the class
    noise = rng.permutation(log_p)
    assert fit_hint_weight(made_up(large, labels), [noise]) == 0
    assert fit_hint_weight(made_up(large, labels), [np.zeros_like(log_p)]) == 0


def test_imagenet_weights_bring_their_own_mean_and_their_own_size(tmp_path: Path) -> None:
    lite = large_preprocess(image_task(tmp_path, large={"kind": "efficientnet-lite", "size": 96}))
    assert (lite.size, lite.mean, lite.std) == (96, (127.0,) * 3, (128.0,) * 3)
    net = large_preprocess(image_task(tmp_path, large={"kind": "resnet"}))
    assert (net.size, net.mean) == (32, (125.0, 123.0, 114.0))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="49 rows are too few"):
        fit_large(task_of(tmp_path), image_split(49), quiet)


def test_missing_weights_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        check_large(image_task(tmp_path, large={"kind": "efficientnet-lite", "net": {"weights": "nowhere"}}))


def write_task(root: Path) -> Task:
    """With an .npz of the edge's own labels, for hints."""
    images, labels = tinted(60, seed=4)
    np.savez(root / "train.npz", images=images, labels=np.array(LABELS)[labels])
    return image_task(root, data={"train": "train.npz"}, large={"kind": "resnet", "net": {**NET, "epochs": 3}})


@pytest.mark.slow
def test_the_cloud_serves_what_was_trained(tmp_path: Path) -> None:
    task, data = write_task(tmp_path), image_split(120)
    said: list[str] = []
    large = LargeInProcess(task, tmp_path / "large", data, said.append)
    described = read_large(tmp_path / "large")
    assert described.kind == "resnet" and described.model == "large.onnx" and described.preprocess.kind == "image"
    figures = f"temperature {described.temperature:.2f}, hint weight {described.hint_weight:.2f}"
    assert any(figures in line and "on 12 rows" in line for line in said)

    fitted = fit_large(task, data, quiet)  # the same again
    images, _ = tinted(20, seed=1)
    payloads = image_split(20, seed=1).payloads
    plain = fuse(fitted.model.logits(images), np.zeros((20, 3), np.float32), temperature=fitted.temperature, weight=0.0)
    np.testing.assert_allclose(large.logits(payloads), plain, atol=2e-3)
    again = [payloads[3], *image_split(2, seed=2).payloads, payloads[3], payloads[0]]  # some known, one twice
    np.testing.assert_allclose(large.logits(again)[[0, 3, 4]], plain[[3, 3, 0]], atol=2e-3)
    served = load_large(tmp_path / "large")
    assert served.teacher_id == f"resnet-{described.large_id}" and served.reads_hints == (described.hint_weight > 0)
    hint = Hint(label_ids=(1,), probabilities=(0.9,), confidence=0.9)
    shown = served.logits(payloads, [hint] * 20)
    expected = plain + described.hint_weight * log_prior([hint], 3)
    np.testing.assert_allclose(shown - expected, np.zeros_like(shown), atol=2e-3)


@pytest.mark.slow
def test_a_simulations_large_model_reads_no_hints(tmp_path: Path) -> None:
    LargeInProcess(task_of(tmp_path, epochs=1), tmp_path / "large", image_split(60), quiet, hints=False)
    assert read_large(tmp_path / "large").hint_weight == 0
    assert not load_large(tmp_path / "large").reads_hints


@pytest.mark.slow
def test_train_large_measures_on_test(tmp_path: Path, kcm) -> None:  # type: ignore[no-untyped-def]
    for name, rows, seed in (("train", 60, 0), ("test", 30, 1)):
        images, labels = tinted(rows, seed=seed)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(LABELS)[labels])
    (tmp_path / "task.toml").write_text(
        '[task]\nid = "tints"\nmodality = "image"\nlabels = ["red", "green", "blue"]\n'
        '[data]\ntrain = "train.npz"\ntest = "test.npz"\n[preprocess]\nkind = "image"\nmean = [125, 123, 114]\nstd = [63, 62, 67]\n'
        '[small]\nkind = "resnet"\n[small.net]\nwidth = 4\nepochs = 3\nbatch = 16\n[judge]\nfolds = 2\n'
        '[large]\nkind = "bbn"\n[large.net]\ndepth = 8\nwidth = 8\nepochs = 4\nbatch = 16\n'
    )
    code, out, err = kcm("train-large", "--task", tmp_path, "--out", tmp_path / "large", "--json")
    assert code == 0, err
    assert json.loads(out)["test_accuracy"] > 0.6
    assert read_large(tmp_path / "large").kind == "bbn"


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not LITE.is_dir(), reason="kcm fetch efficientnet-lite0")
def test_a_frozen_large_models_kept_back_rows_are_judged_by_a_head_that_had_not_seen_them(tmp_path: Path) -> None:
    net = {"weights": str(LITE), "frozen": True}
    task, data = image_task(tmp_path, large={"kind": "efficientnet-lite", "size": 64, "net": net}), image_split(120)
    shuffled = Split("train", data.payloads, np.random.default_rng(0).permutation(data.y))
    fitted = fit_large(task, shuffled, quiet)  # labels that can only be learnt by heart
    assert (fitted.logits.argmax(1) == fitted.labels).mean() < 0.8
    images = task.preprocess.size
    assert fitted.model.size == 64 != images


def test_a_hint_that_says_no_more_than_the_class_prior_weighs_nothing() -> None:
    """The kept rows are of a long tail and the logits of a balanced world: without the shift the prior itself would look like news."""
    draw, prior = np.random.default_rng(0), np.array([0.8, 0.15, 0.05], np.float32)
    labels = draw.choice(3, 2000, p=prior / prior.sum())
    logits = (2 * (draw.normal(size=(2000, 3)) + 2 * np.eye(3)[labels])).astype(np.float32)
    hints = [np.tile(np.log(prior), (2000, 1))]
    assert fit_hint_weight(KeptBack(logits, labels, np.log(prior), 1.0), hints) < 0.1
    assert fit_hint_weight(KeptBack(logits, labels, np.zeros(3, np.float32), 1.0), hints) > 0.5
