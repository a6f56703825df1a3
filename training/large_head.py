"""The large encoder's head: a linear classifier on its frozen, unit-normalised sentence embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.assets import MODELS
from kcm.task import Task

Float32 = NDArray[np.float32]
_INVERSE_L2 = 30.0  # best of 3..100 by cross-validation on R52 and CLINC150 embeddings; flat around it


@dataclass(frozen=True)
class Head:
    """logits = embedding [D] @ weight [C, D].T + bias [C]."""

    weight: Float32
    bias: Float32

    def logits(self, embeddings: Float32) -> Float32:
        """[N, D] → [N, C]."""
        return embeddings @ self.weight.T + self.bias


def fit_head(embeddings: Float32, labels: NDArray[np.int64], classes: int, seed: int = 0) -> Head:
    """Multinomial logistic regression with L2. Classes without a row get a bias far below the others.

    Args:
        embeddings: [N, D], unit length. labels: [N].
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=_INVERSE_L2, max_iter=1000, random_state=seed).fit(embeddings, labels)
    weight = np.zeros((classes, embeddings.shape[1]), np.float32)
    bias = np.full(classes, float(model.intercept_.min()) - 5.0, np.float32)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        weight[model.classes_] = np.concatenate([-model.coef_, model.coef_]) / 2
        bias[model.classes_] = np.concatenate([-model.intercept_, model.intercept_]) / 2
    else:
        weight[model.classes_] = model.coef_
        bias[model.classes_] = model.intercept_
    return Head(weight, bias)


def save_large(folder: Path, task: Task, head: Head | None) -> str:
    """Write large.json (and head.safetensors) as cloud_server reads it; returns the large model's id."""
    from safetensors.numpy import save

    more = {
        "kind": task.large.kind,
        "model": task.large.model if task.large.model in MODELS else str(task.path(task.large.model).resolve()),
        "max_tokens": task.large.max_tokens,
        "hint_dropout": task.large.hint_dropout,
        "temperature": 1.0,
        "prompt": msgspec.to_builtins(task.prompt),
    }
    return write_large(folder, task, more, {} if head is None else {"head.safetensors": save({"weight": head.weight, "bias": head.bias})})


def write_large(folder: Path, task: Task, description: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """large.json, and the files that it stands on before it; returns the id: a hash of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {"schema": 1, "labels": list(task.labels), "task_id": task.id, **description}
    digest = hashlib.sha256(msgspec.json.encode(whole, order="deterministic"))
    for name, data in files.items():
        (folder / name).write_bytes(data)
        digest.update(data)
    whole["large_id"] = digest.hexdigest()[:12]
    (folder / "large.json").write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
    return str(whole["large_id"])
