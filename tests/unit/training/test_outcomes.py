"""Reading recorded outcomes: what is taken, and what is refused with file, line and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from kcm.errors import DataError
from training.outcomes import read_outcomes


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_read_in_any_order_and_truth_in_any_spelling(tmp_path: Path) -> None:
    data = read_outcomes(write(tmp_path / "a.csv", 'strong_correct,prompt,weak_correct\n1,"a, b",False\ntrue,"c\nd",TRUE\n1.0,e,0\n'))
    assert data.prompts == ["a, b", "c\nd", "e"] and data.weak.tolist() == [False, True, False] and data.strong.all()
    assert data.answers == [] and data.subjects == [] and data.gain.tolist() == [1, 0, 1]
    assert data.groups("prompt").tolist() == [0, 1, 2]


def test_answers_and_subjects_come_along(tmp_path: Path) -> None:
    text = "prompt,weak_correct,strong_correct,weak_response,subject\np,0,1,w,law\np,0,1,,art\n"
    data = read_outcomes(write(tmp_path / "a.csv", text))
    assert data.answers == ["w", ""] and data.subjects == ["law", "art"]
    assert data.groups("prompt").tolist() == [0, 0] and data.groups("subject").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'prompt', only nothing"),
        ("prompt,weak_correct\na,1\n", "has no column 'strong_correct'"),
        ("prompt,weak_correct,strong_correct\n", "has no rows"),
        ("prompt,weak_correct,strong_correct\na,0,1\nb,maybe,1\n", "line 3: weak_correct is 'maybe'"),
        ("prompt,weak_correct,strong_correct\na,1\n", "line 2: strong_correct is None"),
        ("prompt,weak_correct,strong_correct\na,1,1\nb,0,0\n", "there is no gap to recover"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_outcomes(write(tmp_path / "a.csv", text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_outcomes(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(DataError, match="can't be read"):
        read_outcomes(tmp_path / "b.csv")
