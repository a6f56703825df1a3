"""What calibration reads of an image task: nothing in two parts, nothing that the run has seen, and no photo kept in memory for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from image_kit import png, scene
from vision_kit import LABELS, image_run, image_task

from kcm.app.samples import fresh_payloads, labelled_splits
from kcm.task import Task
from training.image_files import Files
from training.reserve import reserved
from training.run import Run


def write(root: Path, name: str, seeds: range) -> str:
    """A table of scenes; those of one seed are the same image, whatever the table."""
    (root / "p").mkdir(exist_ok=True)
    rows = []
    for seed in seeds:
        (root / "p" / f"{name}{seed}.png").write_bytes(png(scene(32, 32, seed=seed)))
        rows.append(f"p/{name}{seed}.png,{LABELS[seed % 3]}")
    (root / f"{name}.csv").write_text("\n".join(["image,label", *rows]))
    return f"{name}.csv"


def named(root: Path, **files: range) -> Task:
    task = image_task(root)
    return msgspec.structs.replace(
        task, data=msgspec.structs.replace(task.data, **{name: write(root, name, seeds) for name, seeds in files.items()})
    )


def test_selection_and_calibration_share_no_image(tmp_path: Path) -> None:
    selection, calibration = labelled_splits(named(tmp_path, calibration=range(40), selection=range(30, 60)), divided=True)
    assert selection is not None and (len(selection), len(calibration)) == (30, 30)
    assert not set(selection.payloads) & set(calibration.payloads)
    assert isinstance(selection.payloads, Files) and isinstance(calibration.payloads, Files)
    assert calibration.y.tolist() == [seed % 3 for seed in range(30)]


def test_one_file_is_divided_by_its_images(tmp_path: Path) -> None:
    selection, calibration = labelled_splits(named(tmp_path, calibration=range(60)), divided=True)
    assert selection is not None and len(selection) + len(calibration) == 60 and 8 <= len(selection) <= 32
    assert not set(selection.payloads) & set(calibration.payloads)


@pytest.mark.slow
def test_fresh_images_are_those_of_the_stream_that_no_run_learnt_from(tmp_path: Path) -> None:
    run = image_run(image_task(tmp_path), rows=30)
    seen = list(run.payloads)
    (tmp_path / "p").mkdir()
    for i, payload in enumerate([*seen[:10], *(png(scene(32, 32, seed=i)) for i in range(200))]):
        (tmp_path / "p" / f"{i:03}.png").write_bytes(payload if isinstance(payload, bytes) else b"")
    task = msgspec.structs.replace(run.task, data=msgspec.structs.replace(run.task.data, stream="p"), root=str(tmp_path))

    def of_round(round_: int) -> Run:
        return replace(run, info=msgspec.structs.replace(run.info, task=task, round=round_))

    fresh = fresh_payloads(of_round(0))
    assert isinstance(fresh, Files) and len(fresh) == 200 and not set(fresh) & set(seen)
    kept = fresh_payloads(of_round(1))
    assert 5 <= len(kept) <= 45 and all(map(reserved, kept)) and set(kept) <= set(fresh)
