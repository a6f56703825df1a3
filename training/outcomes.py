"""Recorded outcomes of a weak and a strong model on the same prompts: a CSV file, read and checked."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError

Bool = NDArray[np.bool_]
Index = NDArray[np.int64]

_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_NEEDED = ("prompt", "weak_correct", "strong_correct")


@dataclass(frozen=True)
class Outcomes:
    """N prompts and whether each model was right on them; answers [N] of the weak model and subjects [N] are empty where not recorded."""

    prompts: list[str]
    weak: Bool
    strong: Bool
    answers: list[str]
    subjects: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def gain(self) -> NDArray[np.float64]:
        """[N]: 1 where only the strong model is right, −1 where only the weak one is."""
        return self.strong.astype(np.float64) - self.weak

    def groups(self, by: str) -> Index:
        """A number per row [N], the same for rows of one prompt or of one subject.

        Raises:
            DataError: grouped by subject, and the file has none.
        """
        if by == "subject" and not self.subjects:
            raise DataError("the file has no column 'subject' to group by", fix="leave --group-by out")
        values = self.subjects if by == "subject" else self.prompts
        place = {value: i for i, value in enumerate(dict.fromkeys(values))}
        return np.array([place[value] for value in values], np.int64)


def read_outcomes(path: Path) -> Outcomes:
    """CSV with prompt, weak_correct, strong_correct and optionally weak_response and subject.

    Raises:
        DataError: not there, no UTF-8, a column lacks, an outcome that is no truth value, no rows, or no gap between the models.
    """
    csv.field_size_limit(2**24)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [name for name in _NEEDED if name not in columns]:
                raise DataError(
                    f"{path} has no column {missing[0]!r}, only {', '.join(columns) or 'nothing'}", fix=f"columns: {', '.join(_NEEDED)}"
                )
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    weak, strong = (np.array([_truth(path, line, name, row[name]) for line, row in rows]) for name in _NEEDED[1:])
    if strong.mean() <= weak.mean():
        raise DataError(
            f"{path}: the strong model is right on {strong.mean():.1%}, the weak one on {weak.mean():.1%}: there is no gap to recover"
        )
    return Outcomes(
        prompts=[row["prompt"] or "" for _, row in rows],
        weak=weak,
        strong=strong,
        answers=[row["weak_response"] or "" for _, row in rows] if "weak_response" in columns else [],
        subjects=[row["subject"] or "" for _, row in rows] if "subject" in columns else [],
    )


def _truth(path: Path, line: int, name: str, value: str | None) -> bool:
    found = _TRUTH.get((value or "").strip().lower())
    if found is None:
        raise DataError(f"{path}, line {line}: {name} is {value!r}", fix="write True or False (or 1 and 0)")
    return found
