"""The CIFAR-100-LT benchmark: what each split holds, and a whole quick run on drawn scenes in the files' form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from vision_kit import LABELS, tinted

from benchmarks import cifar100_lt
from training.data import identity

ROWS = (150, 40, 10)  # one class of each group


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cifar100_lt, "SELECTION", 30)
    x, y = tinted(3 * max(ROWS))
    kept = np.concatenate([np.flatnonzero(y == label)[:count] for label, count in enumerate(ROWS)])
    x_dev, y_dev = tinted(120, seed=1)
    np.savez(
        tmp_path / "cifar100_lt_if100_dev.npz", x_train=x[kept], y_train=y[kept].astype(np.uint8), x_dev=x_dev, y_dev=y_dev, classes=LABELS
    )
    np.savez(tmp_path / "cifar100_stream_unlabelled.npz", x=tinted(90, seed=2)[0])
    return tmp_path


def test_the_edge_has_a_fifth_of_each_class_and_the_test_is_nobody_elses(folder: Path) -> None:
    data = cifar100_lt.Data(folder, quick=False)
    first, other = data.edge(0), data.edge(1)
    np.testing.assert_array_equal(np.bincount(first.y), [30, 8, 2])
    assert set(first.payloads) < set(data.all.payloads) and set(first.payloads) != set(other.payloads)
    assert (len(data.selection), len(data.test)) == (30, 90)
    splits = [set(map(identity, split.payloads)) for split in (data.all, data.stream, data.selection, data.test)]
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert {name: np.flatnonzero(member).tolist() for name, member in data.groups.items()} == {"many": [0], "medium": [1], "few": [2]}
    found = data.by_group(data.test.y == 1)
    assert found["medium"] == 1 and found["many"] == found["few"] == 0 and found["all"] == pytest.approx((data.test.y == 1).mean())


@pytest.mark.slow
def test_a_quick_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, keep = folder / "out.json", folder / "keep"
    arguments = [
        "cifar100_lt",
        "--data",
        str(folder),
        "--quick",
        "--large",
        "resnet",
        "--width",
        "4",
        "--out",
        str(out),
        "--keep",
        str(keep),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    cifar100_lt.main()
    said = capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert set(summary["methods"]) == {"kcm", "mcm"} and "kcm_minus_mcm" in summary["between"]
    for name in ("kcm", "mcm"):
        found = summary["methods"][name]
        assert len(found["curve"]) == len(found["groups"]) == 2
        last = found["groups"][-1]
        assert found["curve"][-1]["1.0"] == pytest.approx(last["large"]["all"]) and found["curve"][-1]["0.3"] == pytest.approx(
            last["kcm"]["all"]
        )
        assert found["minus_large"]["mean"] == pytest.approx(last["kcm"]["all"] - last["large"]["all"])
        assert f"{name} at 30 %" in said
    kept = (keep / "answers.npz").stat().st_mtime_ns
    cifar100_lt.main()  # the large model isn't fitted again
    assert (keep / "answers.npz").stat().st_mtime_ns == kept
