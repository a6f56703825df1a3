"""Where accuracy is won and lost: by how often a class was seen in training, and by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Ids = NDArray[np.int64]

GROUPS = ("many", "medium", "few")


def frequency_groups(frequency: NDArray[np.integer]) -> dict[str, Bool]:
    """Which classes [C] are the most frequent third, the next and the rarest, by their training rows [C].

    Thirds, not the numbers of rows that image benchmarks use (> 100, 20 to 100, < 20; Liu et al. 2019): an edge has few rows of any.
    Of equally frequent classes the first counts as the more frequent.
    """
    thirds = np.array_split(np.argsort(-np.asarray(frequency), kind="stable"), len(GROUPS))
    return {name: np.isin(np.arange(len(frequency)), third) for name, third in zip(GROUPS, thirds, strict=True)}


def by_group(groups: Mapping[str, Bool], labels: Ids, right: Mapping[str, NDArray[np.floating]]) -> dict[str, Any]:
    """Per group its classes and test samples, and each column's accuracy there (None without a sample).

    Args:
        labels: [N] true ids. right: correctness [N] per column, means over runs where there are several.
    """
    rows: dict[str, Any] = {}
    for name, member in groups.items():
        inside = member[labels]
        accuracy = {column: float(values[inside].mean()) if inside.any() else None for column, values in right.items()}
        rows[name] = {"classes": int(member.sum()), "samples": int(inside.sum()), "accuracy": accuracy}
    return rows


def rescued(answers: Ids, labels: Ids, large_right: Bool, escalated: Bool, names: tuple[str, ...], top: int = 10) -> list[Any]:
    """The classes where the small model is most often wrong and the large one right.

    Per class: how many such samples, how many of them went up, the small model's most frequent wrong answer there, and the
    other way round (small right, large wrong).

    Args:
        answers, escalated: [S, N] over runs; counts are means over them. labels, large_right: [N].
    """
    runs = len(answers)
    wrong = (answers != labels) & large_right
    count = np.bincount(np.tile(labels, runs), wrong.ravel(), len(names))
    lost = np.bincount(np.tile(labels, runs), ((answers == labels) & ~large_right).ravel(), len(names))
    rows = []
    for label in np.argsort(-count, kind="stable")[:top]:
        if count[label] == 0:
            break
        here = wrong & (labels == label)
        said = np.bincount(answers[here], minlength=len(names))
        rows.append(
            {
                "label": names[label],
                "test_samples": int((labels == label).sum()),
                "large_right_small_wrong": float(count[label] / runs),
                "of_these_escalated": float(escalated[here].sum() / runs),
                "small_right_large_wrong": float(lost[label] / runs),
                "small_says": names[int(said.argmax())],
                "small_says_samples": float(said.max() / runs),
            }
        )
    return rows
