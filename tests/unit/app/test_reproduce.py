"""`kcm reproduce`: cells are kept and taken up again, and the tables say what was run and what wasn't."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_kit import sentences

from kcm.app.reproduce import paper
from kcm.app.reproduce.cells import METHODS, Cell, cells, identity
from kcm.app.reproduce.cifar import LABELLED, STREAM, write_cifar_task
from kcm.app.reproduce.plan import TABLES, Budget, Part, absent
from kcm.app.reproduce.tables import ablation, table
from kcm.errors import DataError
from kcm.task import load_task
from training.data import load_split
from training.simulate import Setting
from training.small import Ngrams

PART = Part(name="tiny", title="Tiny", task="tiny", differs="everything", whole=Budget(seeds=2, rounds=1), quick=Budget(seeds=1, rounds=1))


@pytest.fixture(scope="module")
def setting(tiny_task: Path) -> Setting:
    task = load_task(tiny_task)
    train, stream, test = (load_split(task, name) for name in ("train", "stream", "test"))
    truth = {text: task.labels.index(label) for seed, size in ((0, 72), (2, 400), (4, 200)) for text, label in sentences(size, seed)}

    def teacher(payloads: Any) -> np.ndarray:
        logits = np.zeros((len(payloads), len(task.labels)), np.float32)
        logits[np.arange(len(payloads)), [truth[payload] for payload in payloads]] = 6
        return logits

    return Setting(
        task=task,
        kind=Ngrams(task, None),
        train=train,
        stream=stream,
        test=test,
        teacher=teacher,
        large_test=teacher(test.payloads),
        rounds=1,
        share=0.4,
        floor=False,
    )


@pytest.fixture(scope="module")
def done(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    folder = tmp_path_factory.mktemp("cells")
    return folder, list(cells(PART, PART.whole, folder, "k", lambda: setting, lambda _: None))


def never() -> Setting:
    raise AssertionError("a cell that is there was run again")


def test_every_method_of_a_seed_comes_before_the_next_seed(done: tuple[Path, list[Cell]]) -> None:
    assert [(cell.seed, cell.method) for cell in done[1]] == [(seed, method) for seed in (0, 1) for method in METHODS]
    for cell in done[1]:
        assert cell.answers("small").mean() == pytest.approx(cell.last["small_accuracy"])
        assert cell.answers("kcm").mean() == pytest.approx(cell.last["curve"]["0.3"]["accuracy"])


def test_a_second_run_takes_up_what_is_there(done: tuple[Path, list[Cell]], setting: Setting, tmp_path: Path) -> None:
    folder, first = done
    assert list(cells(PART, PART.whole, folder, "k", never, lambda _: None)) == first
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "tiny-kd-1-k.json"
    broken.write_bytes(broken.read_bytes()[:100])
    said: list[str] = []
    again = list(cells(PART, PART.whole, tmp_path, "k", lambda: setting, said.append))
    assert said and all(line.startswith("Tiny, KD, seed 1: ") for line in said)
    assert [msgspec.structs.replace(cell, seconds=0.0) for cell in again] == [msgspec.structs.replace(cell, seconds=0.0) for cell in first]


def test_another_task_its_data_or_size_begins_anew_and_more_seeds_do_not(tiny_task: Path, tmp_path: Path) -> None:
    file = Path(shutil.copytree(tiny_task, tmp_path / "task")) / "task.toml"
    fewer = msgspec.structs.replace(PART.whole, at_most={"test": 50})
    keys = [identity(PART, PART.whole, tiny_task / "task.toml"), identity(PART, fewer, file)]
    assert identity(PART, PART.whole, file) == keys[0]
    assert identity(PART, msgspec.structs.replace(PART.whole, seeds=9), file) == keys[0]
    for name in ("stream.csv", "test.csv", "task.toml"):
        with (file.parent / name).open("a") as out:
            out.write("# \n" if name == "task.toml" else f"one more,{load_task(file).labels[0]}\n")
        keys.append(identity(PART, PART.whole, file))
    assert len(set(keys)) == len(keys)


def test_a_part_is_absent_where_any_model_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    parts = {part.name: part for shown in TABLES for part in shown.parts}
    assert absent(parts["cifar-resnet"], tmp_path) == ""
    assert "kcm fetch efficientnet-lite0" in absent(parts["cifar-efficientnet"], tmp_path)
    for name in ("emoji-i2t", "r52"):
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        gallery = '[gallery]\nfile = "g.csv"\n[small]\nkind = "dual"\n[large]\nkind = "dual"\n' if name == "emoji-i2t" else ""
        (folder / "task.toml").write_text(f'[task]\nid = "t"\nlabels = ["a", "b"]\n{gallery}')
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    assert "kcm fetch minilm" in absent(parts["r52-smollm2"], None), "its small model takes word vectors from it"
    (tmp_path / "models" / "minilm").mkdir()
    assert absent(parts["r52"], None) == absent(parts["r52-smollm2"], None) == ""
    assert "kcm fetch efficientnet-lite0" in absent(parts["emoji-i2t"], None)
    (tmp_path / "models" / "efficientnet-lite0").mkdir()
    assert absent(parts["emoji-i2t"], None) == absent(parts["cifar-efficientnet"], tmp_path) == ""


def test_no_two_columns_of_the_ablation_have_one_name() -> None:
    titles = [part.title for shown in TABLES for part in shown.parts]
    assert len(set(titles)) == len(titles)


def test_a_table_shows_ours_beside_the_papers_and_names_what_is_absent(done: tuple[Path, list[Cell]]) -> None:
    shown = msgspec.structs.replace(TABLES[0], parts=(PART, msgspec.structs.replace(PART, name="other", title="Other")))
    lines = "\n".join(table(shown, {"tiny": done[1]}, {"other": "kcm fetch other"}))
    kcm = [cell.last["curve"]["0.3"]["accuracy"] for cell in done[1] if cell.method == "kcm"]
    row = next(line for line in lines.split("\n") if line.startswith("| +KCM"))
    assert f"{100 * np.mean(kcm):.2f} ± {100 * np.std(kcm, ddof=1):.2f}" in row and "86.80" in row
    kd = [cell.last["small_accuracy"] for cell in done[1] if cell.method == "kd"]
    assert f"{100 * np.mean(kd):.2f}" in next(line for line in lines.split("\n") if line.startswith("| +KD"))
    assert "Other wasn't run: kcm fetch other" in lines and re.search(r"KCM − MCM [+-]\d+\.\d\d \[", lines)
    assert "KCM − MCM" in "\n".join(ablation({"tiny": done[1]}, [shown]))


def test_the_papers_rows_are_whole() -> None:
    for rows, columns in ((paper.BERT, paper.APD), (paper.CHATGPT, paper.APD), (paper.RESNET, paper.LONG_TAIL), (paper.CLIP, paper.RECALL)):
        assert all(len(row) == len(columns) for row in rows.values())
    for rows in (paper.BERT, paper.CHATGPT):  # an average that isn't one would be a slip of ours
        assert all(np.mean(row[:-1]) == pytest.approx(row[-1], abs=0.011) for row in rows.values())


def test_cifar_is_divided_without_overlap(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    classes = np.array([f"c{i}" for i in range(4)])
    y = np.repeat(np.arange(4), (40, 20, 10, 2)).astype(np.uint8)
    images = random.integers(0, 256, (len(y), 32, 32, 3), np.uint8)
    dev = np.repeat(np.arange(4), 30).astype(np.uint8)
    x_dev = random.integers(0, 256, (len(dev), 32, 32, 3), np.uint8)
    np.savez(tmp_path / LABELLED, x_train=images, y_train=y, x_dev=x_dev, y_dev=dev, classes=classes)
    np.savez(tmp_path / STREAM, x=x_dev[:50])
    for large in ("resnet", "bbn", "efficientnet-lite"):
        task = load_task(write_cifar_task(tmp_path, tmp_path / large, large=large, epochs=2))
        assert task.large.kind == large and task.small.net.epochs == task.large.net.epochs == 2
    splits = {name: load_split(task, name) for name in ("train", "large_train", "selection", "test")}
    assert np.bincount(splits["train"].y).tolist() == [8, 4, 2, 1] and set(splits["train"].payloads) <= set(splits["large_train"].payloads)
    assert len(splits["selection"]) == 24 and len(splits["test"]) == 96
    assert not set(splits["selection"].payloads) & set(splits["test"].payloads)
    assert load_split(task, "stream").labels is None


def test_what_is_no_cifar_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / LABELLED, x=np.zeros(3))
    with pytest.raises(DataError, match=r"can't be read as CIFAR-100-LT.*x_train") as refused:
        write_cifar_task(tmp_path, tmp_path / "task", large="resnet")
    assert "--cifar" in refused.value.fix


def test_an_unknown_table_is_3_and_a_missing_task_is_named(
    kcm: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "empty"))
    code, _, err = kcm("reproduce", "vison", "--out", tmp_path / "out")
    assert code == 3 and "'vison'" in err and "vision" in err
    code, out, _ = kcm("reproduce", "language", "vision", "--quick", "--out", tmp_path / "out")
    assert code == 0 and "R52 wasn't run" in out and "kcm fetch r52" in out and "--cifar" in out
    assert (tmp_path / "out" / "tables.md").read_text().startswith("# The paper's tables, quick")


def made_up(method: str) -> Cell:
    """No two figures alike: in thousandths, hundreds are round 0, tens the system, ones the method; tenths the column."""
    own = METHODS.index(method)

    def row(first: bool) -> dict[str, Any]:
        base = {system: (100 * first + 10 * place + own) / 1000 for place, system in enumerate(("small", "kcm", "large"), 1)}
        return {
            "small_accuracy": base["small"],
            "large_accuracy": base["large"],
            "curve": {"0.3": {"accuracy": base["kcm"], "realised_rate": 0.25}},
            "groups": {s: {g: v + n / 10 for n, g in enumerate(("many", "medium", "few"), 1)} for s, v in base.items()},
            "recall": {s: {k: v + n / 10 for n, k in enumerate(("1", "5", "10"), 1)} for s, v in base.items()},
        }

    right = {name: np.packbits(np.arange(8) < own).tobytes() for name in ("small", "kcm")}
    right["small"] = np.packbits(np.zeros(8, bool)).tobytes()
    return Cell(schema=1, part="tiny", method=method, seed=0, samples=8, first=row(True), last=row(False), right=right, seconds=1.0)


@pytest.mark.parametrize("name", ["vision", "multimodal"])
def test_each_row_has_the_figures_of_its_own_system_round_and_method(name: str) -> None:
    shown = msgspec.structs.replace(next(t for t in TABLES if t.name == name), parts=(PART,))
    lines = table(shown, {"tiny": [made_up(method) for method in METHODS]}, {})
    rows = {
        line[2:].split("|")[0].strip().removeprefix("Tiny: "): [cell.strip() for cell in line.split("|")[2:6]]
        for line in lines
        if line.startswith("| ")
    }
    for label, base in {
        "large model alone": 0.033,
        "small model alone, round 0": 0.113,
        "+D, small model alone": 0.010,
        "+KD, small model alone": 0.011,
        "+MCM at 30% calls": 0.022,
        "+KCM at 30% calls": 0.023,
    }.items():
        assert rows[label][:3] == [f"{100 * (base + n / 10):.2f}" for n in (1, 2, 3)]
        assert name != "vision" or rows[label][3] == f"{100 * base:.2f}"
    said = "\n".join(lines)
    assert "KCM − D +37.50" in said and "KCM − MCM +12.50" in said and "KCM made 25.0%" in said
    assert ("thirds of the classes" in said) == (name == "vision")


def test_the_ablation_is_kcm_minus_mcm() -> None:
    lines = ablation({"tiny": [made_up(method) for method in METHODS]}, [msgspec.structs.replace(TABLES[0], parts=(PART,))])
    assert re.search(r"\| KCM − MCM .*\| \+12\.50 \[", "\n".join(lines))
