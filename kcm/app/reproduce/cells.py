"""One cell: a part, a method and a seed. Each is kept in a file once it is done, so that a run which was cut goes on where it was."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.app.reproduce.plan import Budget, Part

if TYPE_CHECKING:
    from training.simulate import Setting

SCHEMA = 1
AT = 0.3  # share of cloud calls at which a routed system is shown
METHODS = ("d", "kd", "mcm", "kcm")
_SPLITS = ("train", "large_train", "stream", "calibration", "selection", "test")


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one seed of one method came to.

    first, last: the rows of round 0 and of the last round, as `kcm simulate --json` gives them. right: which test samples [N] the small
    model alone and the system at AT calls answer rightly, as packed bits.
    """

    schema: int
    part: str
    method: str
    seed: int
    samples: int
    first: dict[str, Any]
    last: dict[str, Any]
    right: dict[str, bytes]
    seconds: float

    def answers(self, name: str) -> NDArray[np.bool_]:
        """[N]: "small" or "kcm"."""
        return np.unpackbits(np.frombuffer(self.right[name], np.uint8), count=self.samples).astype(bool)


def identity(part: Part, budget: Budget, task_toml: Path) -> str:
    """A hash of what a cell's figures rest on: another task, data, size or release of kcm begins anew. More seeds don't.

    Not in it: the weights that were fetched, which are pinned by hash, and images that a table only names.
    """
    from importlib.metadata import version

    from kcm.task import load_task

    task, size = load_task(task_toml), msgspec.structs.replace(budget, seeds=0)
    parts = (str(SCHEMA).encode(), version("kcm").encode(), part.task.encode(), part.large.encode(), task_toml.read_bytes())
    digest = hashlib.sha256(b"\x00".join((*parts, msgspec.json.encode(size))))
    for name in (*(getattr(task.data, split) for split in _SPLITS), task.gallery.file):
        if name and (file := task.path(name)).is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def cells(
    part: Part, budget: Budget, folder: Path, key: str, make: Callable[[], Setting], progress: Callable[[str], None]
) -> Iterator[Cell]:
    """Every method of a seed before the next seed, so that whatever is done can be compared. Those on the disk aren't run again.

    Args:
        make: reads the data and fits the large model; called at the first cell that is missing.
    """
    from training.simulate import simulate_seed

    setting: Setting | None = None
    for seed in range(budget.seeds):
        for method in METHODS:
            file = folder / f"{part.name}-{method}-{seed}-{key}.json"
            if (done := _read(file)) is not None:
                yield done
                continue
            setting = setting or make()
            started, where = time.monotonic(), f"{part.title}, {method.upper()}, seed {seed}: "
            result = simulate_seed(setting, seed, lambda text, where=where: progress(where + text), method)  # type: ignore[misc]
            last = result.right[-1]["kcm"]
            cell = Cell(
                schema=SCHEMA,
                part=part.name,
                method=method,
                seed=seed,
                samples=len(setting.test),
                first=result.rows[0],
                last=result.rows[-1],
                right={name: np.packbits(last[rate].right).tobytes() for name, rate in (("small", 0.0), ("kcm", AT))},
                seconds=time.monotonic() - started,
            )
            building = file.with_suffix(f".{os.getpid()}.building")
            building.write_bytes(msgspec.json.encode(cell))
            building.replace(file)
            yield cell


def _read(file: Path) -> Cell | None:
    """None where there is none, or what is there can't be read: then it is run again."""
    try:
        cell = msgspec.json.decode(file.read_bytes(), type=Cell)
    except (OSError, msgspec.DecodeError):
        return None
    return cell if cell.schema == SCHEMA else None
