"""A task's large image model: fitted in torch, traced, and described for the cloud with the weight that a hint has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.task import Task

if TYPE_CHECKING:
    from training.data import Split

Progress = Callable[[str], None]

_FEWEST, _MOST = 50, 2000  # rows that the temperature and the hint's weight of a user's model are fitted on


def make_large_images(task: Task, folder: Path, train: Split, progress: Progress, *, hints: bool) -> None:
    """Fit the net of [large] on `train` and write large.onnx and large.json.

    Args:
        hints: fit the weight of a hint, too, which takes a small model; else the large model reads none.

    Raises:
        ConfigError: the net or its weights can't be had.
        DataError: an image that can't be decoded, too few rows, or a fit that diverges.
    """
    from export.vision import traced_images
    from training.vision.large import fit_hint_weight, fit_large, save_large_images

    fitted = fit_large(task, train, progress)
    weight = fit_hint_weight(fitted, hint_priors(task, train.take(fitted.kept_back), progress)) if hints else 0.0
    said = said_weight(weight, hints)
    progress(f"large model: temperature {fitted.temperature:.2f}, {said}, on {len(fitted.kept_back)} rows kept back")
    graph = traced_images(fitted.model.module(), fitted.preprocess.size)
    save_large_images(folder, task, fitted, graph.SerializeToString(), weight)


def said_weight(weight: float, hints: bool) -> str:
    """How much a hint weighs, for progress."""
    from training.vision.large import HEAVIEST

    if not hints:
        return "hints left out"
    return f"hint weight {weight:.2f}" + (" (the most that is tried)" if weight > 0.99 * HEAVIEST else "")


def describe_graph(task: Task, folder: Path, train: Split | None, progress: Progress, *, hints: bool) -> None:
    """Copy the user's ONNX classifier into `folder` and describe it: large.json, with the temperature and the weight that a hint has.

    Both are fitted on `train`, which the user's model must not have been fitted on; without it the temperature is 1 and no hint is read.

    Raises:
        ConfigError: the file isn't there, or is no classifier of the task's images.
        DataError: an image that can't be decoded, or too few rows to fit on.
    """
    from cloud_server.models import load_large
    from training.large_head import write_large
    from training.vision.large import GRAPH, KeptBack, check_large, fit_hint_weight, fit_temperature, large_preprocess

    check_large(task)
    graph = task.path(task.large.model).read_bytes()
    described = {"kind": "onnx", "model": GRAPH, "preprocess": msgspec.to_builtins(large_preprocess(task))}

    def write(temperature: float, weight: float) -> None:
        write_large(folder, task, {**described, "temperature": temperature, "hint_weight": weight}, {GRAPH: graph})

    write(1.0, 0.0)
    model = load_large(folder)
    if train is None:
        progress("large model: no large_train under [data], so its temperature is 1 and it reads no hints")
        return
    if len(train) < _FEWEST:
        raise DataError(f"{len(train)} rows are too few to fit a temperature on", fix=f"{_FEWEST} or more, or no large_train under [data]")
    if len(train) > _MOST:
        train = train.take(np.random.default_rng(0).choice(len(train), _MOST, replace=False))
    progress(f"large model: {len(train)} samples")
    logits, shift = model.logits(train.payloads, [None] * len(train)), np.zeros(len(task.labels), np.float32)
    kept = KeptBack(logits, train.y, shift, fit_temperature(logits, train.y, shift))
    weight = fit_hint_weight(kept, hint_priors(task, train, progress)) if hints else 0.0
    progress(f"large model: temperature {kept.temperature:.2f}, {said_weight(weight, hints)}, on {len(train)} rows")
    write(kept.temperature, weight)


def hint_priors(task: Task, rows: Split, progress: Progress) -> list[NDArray[np.float32]]:
    """log p_hint [K, C] for rows that the large model hasn't seen, as candidates and as an assertion."""
    from kcm.app.hint import hints_by_arm
    from kcm.app.models import unseen_predictions
    from kcm.fusion import log_prior

    hints = hints_by_arm(*unseen_predictions(task, rows, progress))
    return [log_prior(hints[arm], len(task.labels)) for arm in ("candidates", "assertion")]
