"""Retrieval as classification over a gallery: the closed form, the small models of both directions, and the whole way to a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cloud_kit
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pair_kit import COLOURS, SHAPES, write_pairs

from kcm.app.pairs import I2T, T2I, read_pairs, write_pair_tasks
from kcm.assets import cache_dir
from kcm.errors import ConfigError, DataError
from kcm.preprocess import NgramPreprocessor
from kcm.task import PreprocessSpec, Task, load_task
from training.data import load_split
from training.fit import cross_fit, item_folds, one_hot, softmax
from training.ngrams import WordVectors, mean_vectors
from training.program import labelled_examples, train_run
from training.retrieval.align import align, hubs, solve, standardised, unit
from training.retrieval.gallery import load_gallery, load_pairs
from training.retrieval.image_query import DualImages
from training.retrieval.large import fit_gallery_head
from training.retrieval.recall import rank_of_truth, recall
from training.retrieval.text_query import DualTexts
from training.run import load_run, save_run

Float32 = NDArray[np.float32]
Kcm = Callable[..., tuple[int, str, str]]
MODELS = cache_dir() / "models"


def rows(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both tasks of ninety drawn items. Read only."""
    root = tmp_path_factory.mktemp("pairs")
    made = {direction: root / direction for direction in (I2T, T2I)}
    write_pair_tasks(made, "drawn", read_pairs(write_pairs(root / "own")), "Drawn")
    return made


def letters(texts: list[str] | tuple[str, ...]) -> Float32:
    """A stand-in for a text encoder of the user's: a vector of each word's own, their sum for a text."""
    return np.stack([np.sum([rows(24, seed=sum(map(ord, word))) for word in text.split()], 0) for text in texts])


def word_table() -> WordVectors:
    preprocessor, words = NgramPreprocessor(PreprocessSpec()), [*COLOURS, *SHAPES, "a", "in"]
    return WordVectors(np.array([preprocessor.word_bucket(word) for word in words], np.int64), letters(words))


def text_task(folder: Path) -> Task:
    """The task with the gallery embedded by pixels, which need no weights."""
    task = load_task(folder)
    net = msgspec.structs.replace(task.small.net, weights="")
    return msgspec.structs.replace(task, small=msgspec.structs.replace(task.small, net=net))


# --- the closed form


@pytest.mark.parametrize("count", [12, 60])
def test_solve_is_ridge_regression_by_either_system(count: int) -> None:
    x, y, weights = rows(count, 30), rows(count, 4, seed=1), np.abs(rows(count, seed=2))
    found = solve(x, y, weights, 0.5)
    gradient = x.T @ (weights[:, None] * (x @ found - y)) + 0.5 * found
    assert np.abs(gradient).max() < 2e-4 * np.abs(x.T @ y).max()


def test_a_row_of_weight_zero_is_not_there() -> None:
    x, y, weights = rows(20, 8), rows(20, 3, seed=1), np.r_[np.ones(15), np.zeros(5)].astype(np.float32)
    np.testing.assert_allclose(solve(x, y, weights, 0.1), solve(x[:15], y[:15], weights[:15], 0.1), atol=1e-5)


def test_align_finds_items_that_no_label_showed() -> None:
    """40 items in a space of 6, queries a noisy linear image of them; half of the items are labelled, the others asked about."""
    items, mix = unit(rows(40, 6)), rows(6, 20, seed=1)
    labels = np.repeat(np.arange(20), 3)
    queries = items[labels] @ mix + 0.05 * rows(60, 20, seed=2)
    weight, gallery = align(queries, one_hot(labels, 40), np.ones(60, np.float32), items, 0.1)
    asked = items[20:] @ mix
    assert (rank_of_truth(asked @ weight @ gallery, np.arange(20, 40)) == 0).mean() > 0.8


def test_items_that_labels_showed_are_shorter_where_queries_are_of_others() -> None:
    """With few labels and noise a query lies nearest to what was fitted on; out of fold that is always wrong."""
    items = unit(rows(60, 12))
    labels = np.repeat(np.arange(20), 2)
    queries = items[labels] @ rows(12, 40, seed=1) + 2.0 * rows(40, 40, seed=2)
    _, gallery = align(queries, one_hot(labels, 60), np.ones(40, np.float32), items, 0.1)
    lengths = np.linalg.norm(gallery, axis=0)
    assert np.ptp(lengths[20:]) < 1e-3 * lengths.max() and np.ptp(lengths[:20]) < 1e-3 * lengths.max()
    assert lengths[0] < 0.95 * lengths[20]


def test_a_soft_target_counts_as_the_embedding_that_it_expects() -> None:
    items, x = unit(rows(6, 3)), rows(30, 4, seed=1)
    targets = np.abs(rows(30, 6, seed=2))
    targets /= targets.sum(1, keepdims=True)
    weight, _ = align(x, targets, np.ones(30, np.float32), items, 0.2)
    np.testing.assert_allclose(weight, solve(x, targets @ items, np.ones(30, np.float32), 0.2), atol=1e-6)


def test_hubs_are_half_the_mean_of_the_nearest() -> None:
    similarities = np.zeros((50, 3), np.float32)
    similarities[:10, 1], similarities[:, 2] = 1.0, 0.4
    np.testing.assert_allclose(hubs(similarities), [0.0, 0.5, 0.2])


def test_queries_of_one_item_share_a_fold() -> None:
    items = np.repeat(np.arange(11), 3)
    folds = item_folds(items, 4, 0)
    assert all(len(set(folds[items == item])) == 1 for item in range(11))
    assert sorted(np.bincount(folds[::3])) == [2, 3, 3, 3]
    with pytest.raises(DataError, match="2 items can't be split into 5 folds"):
        item_folds(np.array([4, 4, 7, 7, 7, 7]), 5, 0)


def test_the_large_head_is_affine_and_ranks_by_the_mapped_query(folders: dict[str, Path]) -> None:
    gallery = load_gallery(load_task(folders[I2T]))
    content, queries = rows(80, 5), rows(80, 9, seed=1)
    inside = rows(len(gallery.payloads), 5, seed=2)
    head = fit_gallery_head(queries, content, gallery, inside)
    assert head.weight.shape == (9, gallery.size) and head.bias.shape == (gallery.size,)
    middle, spread = content.mean(0), content.std(0)
    x = (queries - queries.mean(0)) / queries.std(0) / 3
    mapped = x @ solve(x, unit((content - middle) / spread), np.ones(80, np.float32), 0.3) @ gallery.pooled((inside - middle) / spread).T
    np.testing.assert_allclose(head.logits(queries), mapped - hubs(mapped), atol=1e-4)


# --- recall


def test_rank_of_truth_counts_ties_against_it() -> None:
    logits = np.array([[3, 1, 2, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 5, 5, 9]], np.float32)
    assert rank_of_truth(logits, np.array([2, 0, 3, 1])).tolist() == [1, 0, 3, 2]


def test_recall_takes_the_list_of_whoever_answers() -> None:
    small, large = np.array([0, 4, 20, 8]), np.array([3, 0, 0, 0])
    own, fresh = np.array([0.9, 0.2, 0.3, 0.8], np.float32), np.array([0.1, 0.3, 0.7, 0.9], np.float32)
    found = recall({"kcm": (fresh, own)}, small, large, 0.5)
    assert found["small"] == {"1": 0.25, "5": 0.5, "10": 0.75}
    assert found["large"] == {"1": 0.75, "5": 1.0, "10": 1.0}
    assert found["kcm"] == {"1": 0.75, "5": 0.75, "10": 1.0}  # of the first and the last the small model's


# --- files


def test_no_item_is_in_two_splits_and_pairs_are_of_none(folders: dict[str, Path]) -> None:
    for direction, folder in folders.items():
        task = load_task(folder)
        splits = {name: set(load_split(task, name).y.tolist()) for name in ("train", "stream", "calibration", "test")}
        assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == len(task.labels) == 45
        texts = set(load_pairs(task).texts)
        gallery, named = load_gallery(task), load_split(task, "test").payloads
        assert texts.isdisjoint(gallery.payloads if direction == I2T else named)
        assert np.bincount(gallery.items).tolist() == [2] * 45


def test_pooled_is_the_mean_of_an_items_rows(folders: dict[str, Path]) -> None:
    gallery = load_gallery(load_task(folders[I2T]))
    vectors = rows(len(gallery.payloads), 7)
    first = np.flatnonzero(gallery.items == 3)
    np.testing.assert_allclose(gallery.pooled(vectors)[3], unit(unit(vectors[first]).sum(0)[None])[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label,text\nnobody,hello\n", "unknown label 'nobody'"),
        ("label,text\n{first},\n", "'text' is empty"),
        ("label,words\n{first},hello\n", "'text' is missing; columns are 'label', 'words'"),
        ("label,text\n{first},hello\n", "44 item\\(s\\) have no row"),
        ("label,text\n", "has no rows"),
    ],
)
def test_a_gallery_that_is_wrong_says_where(folders: dict[str, Path], tmp_path: Path, text: str, said: str) -> None:
    task = load_task(folders[I2T])
    (tmp_path / "gallery.csv").write_text(text.format(first=task.labels[0]))
    with pytest.raises(DataError, match=said):
        load_gallery(msgspec.structs.replace(task, root=str(tmp_path)))


def test_a_task_is_a_retrieval_task_whole_or_not_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    text = (folders[I2T] / "task.toml").read_text()
    changes = {
        'file = "gallery.csv"': "",
        'kind = "dual"          # a linear map from pixels': 'kind = "resnet" #',
        'kind = "dual"          # frozen': 'kind = "resnet" #',
    }
    for old, new in changes.items():
        assert old in text
        (tmp_path / "task.toml").write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match="needs a gallery and two models"):
            load_task(tmp_path)
    (tmp_path / "task.toml").write_text(text + '[distill]\ndirection = "reverse"\n')
    with pytest.raises(ConfigError, match="knows no reverse direction"):
        load_task(tmp_path)


# --- the small models


def test_image_queries(folders: dict[str, Path], tmp_path: Path) -> None:
    """Fitted on pictures of six items, saved, loaded and fused with its judge: one ranking everywhere, better than chance on new items."""
    from onnxruntime import InferenceSession

    from export.precisions import Graphs

    torch.set_num_threads(1)
    task = load_task(folders[I2T])
    kind, test = DualImages(task, lambda texts: letters(list(texts))), load_split(task, "stream")
    run = train_run(task, kind, load_split(task, "train"), None, seed=0, progress=lambda _: None)
    save_run(tmp_path, run)
    loaded = load_run(tmp_path)
    features = kind.featurise(test.payloads)
    before, after = kind.predict(run.small, features).logits, kind.predict(loaded.small, features).logits
    np.testing.assert_array_equal(before, after)
    assert rank_of_truth(before, test.y).mean() < 18  # chance: 22
    session = InferenceSession(Graphs(loaded, 5).fuse("fp32"), providers=["CPUExecutionProvider"])
    logits, top = session.run(["logits", "top_ids"], {"image": features})
    np.testing.assert_allclose(logits, before, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(top[:, 0], before.argmax(1))


def test_text_queries(folders: dict[str, Path], tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    from export.precisions import Graphs

    torch.set_num_threads(1)
    task = text_task(folders[T2I])
    kind, test = DualTexts(task, word_table), load_split(task, "stream")
    run = train_run(task, kind, load_split(task, "train"), None, seed=0, progress=lambda _: None)
    save_run(tmp_path, run)
    loaded = load_run(tmp_path)
    features = kind.featurise(test.payloads)
    before, after = kind.predict(run.small, features).logits, kind.predict(loaded.small, features).logits
    np.testing.assert_array_equal(before, after)
    assert rank_of_truth(before, test.y).mean() < 18
    for precision, most in (("fp32", 1e-3), ("fp16", 0.1), ("int8", 0.3)):
        session = InferenceSession(Graphs(loaded, 5).fuse(precision), providers=["CPUExecutionProvider"])  # type: ignore[arg-type]
        logits, top = session.run(["logits", "top_ids"], kind.preprocessor.batch(test.payloads))
        assert np.abs(logits - before).max() < most * np.abs(before).max(), precision
        if precision == "fp32":
            np.testing.assert_array_equal(top[:, 0], before.argmax(1))


def test_what_is_served_is_what_was_fitted(folders: dict[str, Path]) -> None:
    """The models' logits on the very samples that the map was fitted on, computed beside them from pixels and from word vectors."""
    task = load_task(folders[I2T])
    kind = DualImages(task, lambda texts: letters(list(texts)))
    examples = labelled_examples(task, kind, load_split(task, "train"))
    flat = ((examples.features / np.float32(1) - 127) / 128).transpose(0, 3, 1, 2).reshape(len(examples), -1)
    x = (flat - flat.mean(0)) / np.sqrt(flat.shape[1])
    weight, gallery = align(x, examples.targets, examples.weights, kind.items, 0.1)
    found = kind.predict(kind.fit(examples), examples.features).logits
    np.testing.assert_allclose(found, x @ weight @ gallery, rtol=1e-3, atol=1e-3 * np.abs(found).max())

    texts = DualTexts(text_task(folders[T2I]), word_table)
    examples = labelled_examples(task, texts, load_split(load_task(folders[T2I]), "train"))
    dense = mean_vectors(examples.features, word_table(), 3e-2).dense
    weight, gallery = align(dense, examples.targets, examples.weights, texts.items, 0.3)
    found = texts.predict(texts.fit(examples), examples.features).logits
    np.testing.assert_allclose(found, dense @ weight @ gallery, rtol=1e-3, atol=1e-3 * np.abs(found).max())


def test_a_run_of_another_gallery_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from training.retrieval.image_query import load_dual_images

    task = load_task(folders[I2T])
    kind = DualImages(task, lambda texts: letters(list(texts)))
    kind.fit(labelled_examples(task, kind, load_split(task, "train"))).save(tmp_path)
    assert load_dual_images(tmp_path, task).classes == 45
    with pytest.raises(ConfigError, match=r"45|44"):
        load_dual_images(tmp_path, msgspec.structs.replace(task, labels=task.labels[:44]))


def test_judge_folds_keep_an_item_together(folders: dict[str, Path]) -> None:
    """Out of fold no picture of a query's item was fitted on: so says a kind that remembers what it saw."""
    task = load_task(folders[I2T])
    seen: list[set[int]] = []  # items of each fit

    class Watched(DualImages):
        def fit(self, examples):  # type: ignore[no-untyped-def]
            seen.append(set(examples.targets.argmax(1).tolist()))
            return super().fit(examples)

    kind, train = Watched(task, lambda texts: letters(list(texts))), load_split(task, "train")
    cross_fit(task, kind, labelled_examples(task, kind, train))
    everything = set(train.y.tolist())
    held = [everything - inside for inside in seen]
    assert len(held) == 5 and set.union(*held) == everything and sum(map(len, held)) == len(everything)


def test_standardised_columns() -> None:
    found = standardised(rows(50, 4) * np.float32([1, 100, 1, 1]) + 7)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert np.abs(found).mean(0).max() < 2 * np.abs(found).mean(0).min()


# --- the whole way


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("direction", [I2T, T2I])
def test_simulate_train_export(folders: dict[str, Path], tmp_path: Path, kcm: Kcm, direction: str) -> None:
    """`kcm simulate`, then train-large, train, calibrate and export: the bundle's graph ranks as the torch model does."""
    from onnxruntime import InferenceSession

    from cloud_server.models import load_large
    from kcm.app.models import load_small_kind

    for name in ("minilm", "efficientnet-lite0"):
        cloud_kit.real_model(name)
    folder, out = folders[direction], tmp_path / "result.json"
    code, said, err = kcm("simulate", "--task", folder, "--seeds", 1, "--rounds", 1, "--out", out)
    assert code == 0, err
    assert "R@1" in said and "R@10" in said
    last = json.loads(out.read_text())["seeds"][0]["rounds"][-1]
    assert set(last["recall"]) == {"small", "large", "kcm", "twin", "confidence", "max_softmax"}
    for name in ("small", "large"):
        assert last["recall"][name]["1"] == pytest.approx(last[f"{name}_accuracy"])
    assert last["recall"]["large"]["10"] > 0.5  # chance: 10 of 45
    run, large, bundle = tmp_path / "run", tmp_path / "large", tmp_path / "bundle"
    for command in (
        ("train-large", "--task", folder, "--out", large),
        ("train", "--task", folder, "--out", run),
        ("calibrate", run, "--cloud-rate", "0.3", "--large", large),
        ("export", run, "--out", bundle),
    ):
        code, _, err = kcm(*command)
        assert code == 0, (command[0], err)
    code, said, err = kcm("eval", run, "--large", large, "--out", tmp_path / "eval")
    assert code == 0 and "at the run's ε" in said and "R@10" in said, err
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found["recall"]["large"]["5"]["mean"] == pytest.approx(last["recall"]["large"]["5"])
    assert found["recall"]["small"]["1"]["mean"] == pytest.approx(found["references"]["always-small"]["accuracy"]["mean"])
    task, test = load_task(folder), load_split(load_task(folder), "test")
    model = load_large(large)
    assert (model.logits(test.payloads, [None] * len(test)).argmax(1) == test.y).mean() == pytest.approx(last["large_accuracy"])
    kind = load_small_kind(task, lambda _: None)
    expected = kind.predict(load_run(run).small, kind.featurise(test.payloads)).logits
    session = InferenceSession(bundle / "models" / "fp32.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], kind.preprocessor.batch(test.payloads))  # type: ignore[attr-defined]
    assert rank_of_truth(logits, test.y).tolist() == rank_of_truth(expected, test.y).tolist()


def test_a_map_is_as_sure_as_it_is_right_of_items_that_it_was_not_fitted_on() -> None:
    """Queries that say nothing of their items are fitted all the same, each by its own direction: the scale must not believe it."""
    draw = np.random.default_rng(0)
    x, fresh, items = (unit(draw.normal(size=size).astype(np.float32)) for size in ((60, 120), (60, 120), (30, 16)))
    targets = one_hot(np.arange(60) % 30, 30)
    weight, gallery = align(x, targets, np.ones(60, np.float32), items, 0.01)
    assert (x @ weight @ gallery).argmax(1).tolist() == (np.arange(60) % 30).tolist()
    assert softmax(fresh @ weight @ gallery).max(1).mean() < 0.1
