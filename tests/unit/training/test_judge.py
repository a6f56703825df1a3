"""The judge: a probability in [0, 1] that beats max-softmax where there is evidence, and is max-softmax where there is none."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from kcm.task import JudgeSpec
from training.evaluate import auroc
from training.fit import one_hot, softmax
from training.judge import FEATURES, Judge, Predictions, features, fit_judge, fit_temperature, max_softmax, prior, rank_targets

KINDS = (
    JudgeSpec(),
    JudgeSpec(kind="mlp"),
    JudgeSpec(hidden=4),
    JudgeSpec(ranks=1),
    JudgeSpec(degree=1, grid=3),
    JudgeSpec(kind="mlp", ranks=1),
)


def predictions(rows: int = 400, classes: int = 6, seed: int = 0) -> tuple[Predictions, np.ndarray]:
    """Logits that are right as often as their softmax says; length and unknown words say nothing."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, classes)).astype(np.float32)
    cumulative = softmax(logits).cumsum(1)
    labels = (rng.random((rows, 1)) > cumulative).sum(1).clip(0, classes - 1)
    return Predictions(logits, rng.integers(1, 30, rows).astype(np.float32), rng.random(rows).astype(np.float32)), labels


def length_tells(rows: int = 600, seed: int = 0) -> tuple[Predictions, np.ndarray]:
    """Short texts are answered rightly, long ones at random, whatever the logits say."""
    given, _ = predictions(rows, seed=seed)
    rng = np.random.default_rng(seed + 1)
    length = np.where(rng.random(rows) < 0.5, 3, 40).astype(np.float32)
    labels = np.where(length < 10, given.logits.argmax(1), rng.integers(0, 6, rows))
    return Predictions(given.logits, length, given.unknown), labels


def log_loss(confidence: np.ndarray, right: np.ndarray) -> float:
    p = np.clip(confidence.astype(float), 1e-6, 1 - 1e-6)
    return float(-np.where(right, np.log(p), np.log(1 - p)).mean())


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 5), st.sampled_from([1.0, 50.0, 1e4]), st.integers(0, 99))
def test_features_and_prior_have_their_shapes_and_are_finite(classes: int, wanted: int, rows: int, scale: float, seed: int) -> None:
    ranks = min(wanted, classes)
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((rng.normal(size=(rows, classes)) * scale).astype(np.float32))
    length = torch.from_numpy(rng.integers(0, 500, rows).astype(np.float32))
    x = features(logits, length, length / 500, ranks)
    p = prior(logits, torch.tensor(1.5), ranks)
    assert x.shape == (rows, ranks + len(FEATURES))
    assert p.shape == (rows, ranks + 1)
    assert torch.isfinite(x).all() and torch.isfinite(p).all()
    assert (x[:, :ranks].diff(dim=1) <= 0).all()  # best rank first
    assert float(p.exp().sum(1).max()) <= 1 + 1e-3


def test_features_do_not_depend_on_which_class_is_which() -> None:
    """Fold-invariant: another fold's model may permute what it confuses."""
    given, _ = predictions(20)
    order = np.random.default_rng(1).permutation(6)
    moved = Predictions(given.logits[:, order], given.length, given.unknown)
    assert torch.allclose(features(*given.tensors(), 4), features(*moved.tensors(), 4), atol=1e-6)


@pytest.mark.parametrize("spec", KINDS, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_confidence_is_a_probability_for_every_kind_and_number_of_classes(spec: JudgeSpec, classes: int) -> None:
    given, labels = predictions(120, classes)
    judge = fit_judge(spec, given, one_hot(labels, classes))
    extreme = Predictions(
        np.array([np.linspace(-1e4, 1e4, classes), np.zeros(classes), np.full(classes, 1e4)], np.float32),
        np.array([0, 1e6, 1], np.float32),
        np.array([0, 1, 0.5], np.float32),
    )
    for confidence in (judge.confidence(given), judge.confidence(extreme)):
        assert np.isfinite(confidence).all() and confidence.min() >= 0 and confidence.max() <= 1 + 1e-6
    assert judge.ranks == min(spec.ranks, classes)
    with torch.inference_mode():
        assert judge(*given.tensors()).exp().sum(1).numpy() == pytest.approx(np.ones(120), abs=1e-5)


@pytest.mark.parametrize("spec", [JudgeSpec(), JudgeSpec(kind="mlp"), JudgeSpec(hidden=4), JudgeSpec(degree=1)], ids=str)
def test_the_judge_learns_what_the_logits_do_not_say(spec: JudgeSpec) -> None:
    fitted = fit_judge(spec, (seen := length_tells())[0], one_hot(seen[1], 6))
    fresh, labels = length_tells(seed=7)
    right = fresh.logits.argmax(1) == labels
    confidence = fitted.confidence(fresh)
    temperature = fit_temperature(seen[0].logits, one_hot(seen[1], 6))
    assert auroc(confidence, right) > auroc(max_softmax(fresh.logits), right) + 0.2
    assert log_loss(confidence, right) < log_loss(max_softmax(fresh.logits, temperature), right) - 0.15


@pytest.mark.parametrize("spec", [JudgeSpec(), JudgeSpec(kind="mlp")], ids=str)
def test_without_evidence_the_judge_is_max_softmax(spec: JudgeSpec) -> None:
    judge = fit_judge(spec, (seen := predictions(80))[0], one_hot(seen[1], 6))
    fresh, _ = predictions(500, seed=3)
    baseline = max_softmax(fresh.logits, float(judge.temperature))
    assert spearmanr(judge.confidence(fresh), baseline).statistic > 0.95
    untrained = Judge(spec, 6)
    assert untrained.confidence(fresh) == pytest.approx(max_softmax(fresh.logits), abs=1e-4)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(2, 8), st.sampled_from([1, 3]))
def test_the_twin_has_as_many_parameters(ranks: int, hidden: int, grid: int, degree: int) -> None:
    def count(spec: JudgeSpec) -> int:
        return sum(p.numel() for p in Judge(spec, 20).parameters())

    spec = JudgeSpec(ranks=ranks, hidden=hidden, grid=grid, degree=degree)  # type: ignore[arg-type]
    kan, mlp = count(spec), count(msgspec.structs.replace(spec, kind="mlp"))
    one_unit = 2 * ranks + 7
    assert abs(kan - mlp) <= max(0.05 * kan, one_unit / 2)


@pytest.mark.parametrize("ranks", [4, 5, 8])
def test_at_the_usual_sizes_the_twin_is_within_five_percent(ranks: int) -> None:
    sizes = [sum(p.numel() for p in Judge(JudgeSpec(kind=kind, ranks=ranks), 20).parameters()) for kind in ("kan", "mlp")]  # type: ignore[arg-type]
    assert abs(sizes[0] - sizes[1]) <= 0.05 * sizes[0]


def test_a_batch_never_moves_the_judge() -> None:
    """BatchNorm in training mode would make an answer depend on its neighbours."""
    given, labels = predictions(200)
    judge = fit_judge(JudgeSpec(hidden=3), given, one_hot(labels, 6))
    alone = np.concatenate([judge.confidence(given.take(np.array([i]))) for i in range(5)])
    assert alone == pytest.approx(judge.confidence(given)[:5], abs=1e-6)


def test_a_one_layer_kan_needs_no_luck() -> None:
    given, labels = length_tells()
    one, two = (fit_judge(JudgeSpec(), given, one_hot(labels, 6), seed=seed).confidence(given) for seed in (0, 1))
    assert one == pytest.approx(two, abs=2e-3)


def test_targets_by_rank_are_the_mass_at_each_rank() -> None:
    logits = np.array([[0.1, 3.0, 2.0], [5.0, 1.0, 0.0]], np.float32)
    targets = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]], np.float32)
    assert rank_targets(logits, targets, 2) == pytest.approx(np.array([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]), abs=1e-6)


def test_one_sample_is_too_few() -> None:
    given, labels = predictions(1)
    with pytest.raises(ValueError, match="too few"):
        fit_judge(JudgeSpec(), given, one_hot(labels, 6))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    given, labels = predictions(4000)
    assert fit_temperature(given.logits * temperature, one_hot(labels, 6)) == pytest.approx(temperature, rel=0.1)


def test_max_softmax_is_the_largest_probability() -> None:
    given, _ = predictions(50)
    assert max_softmax(given.logits, 2.0) == pytest.approx(softmax(given.logits, 2.0).max(1), abs=1e-6)
