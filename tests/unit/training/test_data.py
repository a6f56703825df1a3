"""A user's files: read as they are, or refused with file, line and the way out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcm.errors import DataError
from kcm.task import DataSpec, Task
from training.data import Split, label_names, load_split, read_rows

ROWS = [("first, with a comma", "a"), ('second "quoted"', "b"), ("third\nover two lines", "a"), ("größer 東京 🙂", "b")]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    path = folder / name
    columns = {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return path


def task(folder: Path, file: str, **more: str) -> Task:
    return Task(id="t", labels=("a", "b"), data=DataSpec(**{"train": file, **more}), root=str(folder))


def failure(folder: Path, name: str, content: bytes, split: str = "train") -> DataError:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_split(task(folder, name, **{split: name}), split)
    assert name in error.value.message
    return error.value


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    split = load_split(task(tmp_path, write(tmp_path, f"rows{ending}", ROWS).name), "train")
    assert split.payloads == [text for text, _ in ROWS]
    assert split.y.tolist() == [0, 1, 0, 1]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(texts, st.sampled_from(["a", "b", "x,y", 'q"q', "ü"])), min_size=1, max_size=8),
    ending=st.sampled_from(["csv", "jsonl", "parquet"]),
)
def test_any_text_comes_back_as_it_was_written(tmp_path: Path, rows: list[tuple[str, str]], ending: str) -> None:
    read, labels, lines = read_rows(write(tmp_path, f"rows.{ending}", rows), "text", "label", labels_optional=False)
    assert list(zip(read, labels, strict=True)) == rows
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,label\nfine,a\nfine,b\nthree,b,more\n", ":4: the row has more or fewer fields"),
        (b"text,label\nfine,a\nfine,b\nonly one\n", ":4: the row has more or fewer fields"),
        (b"text,label\nfine,a\n  ,b\n", ":3: 'text' is empty"),
        (b"text,label\nfine,a\nfine,\n", ":3: 'label' is empty"),
        (b"text,label\nfine,a\nfine,c\n", ":3: unknown label 'c'"),
        (b'text,label\n"over\ntwo",a\nfine,c\n', ":4: unknown label 'c'"),
        (b"text,label\nfine,a\nfine,a\n", "every row has label 'a'"),
        (b"", "has no rows"),
        (b"text,label\n", "has no rows"),
        (b"text,label\nfine,a\nf\xfcr,b\n", "not UTF-8"),
        (b"body,label\nfine,a\n", ":2: 'text' is missing; columns are 'body', 'label'"),
        (b"text,topic\nfine,a\n", ":2: no column 'label', only 'text', 'topic'"),
        (b'text,label\n"never closed,a\n', ": unexpected end of data"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in failure(tmp_path, "rows.csv", content).message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "fine", "label": "a"}\n{"text": "cut\n', ":2: no JSON"),
        (b'{"text": "fine", "label": "a"}\n\n["list"]\n', ":3: expected an object, found list"),
        (b'{"text": "fine", "label": "a"}\n{"text": 3, "label": "b"}\n', ":2: 'text' is empty"),
        (b'{"text": "fine", "label": "a"}\n{"text": "fine", "label": true}\n', ":2: 'label' is empty or no name"),
        (b'{"text": "fine", "label": "a"}\n{"text": "fine"}\n', ":2: 'label' is empty or no name"),
        (b'{"text": "f\xff", "label": "a"}\n', ":1: no JSON"),
        (b'{"text": "half \\ud83d", "label": "a"}\n', ":1: 'text' holds half a surrogate pair"),
        (b'{"text": "fine", "label": "\\udc00"}\n', ":1: 'label' is empty or no name"),
        (b"\n \n", "has no rows"),
    ],
)
def test_a_bad_jsonl_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in failure(tmp_path, "rows.jsonl", content).message


def test_a_parquet_that_is_none_is_refused_and_bad_rows_are_numbered(tmp_path: Path) -> None:
    assert "no readable Parquet" in failure(tmp_path, "rows.parquet", b"PAR1 not really").message
    pq.write_table(pa.table({"text": ["fine", None], "label": ["a", "b"]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet:2: 'text' is empty"):
        load_split(task(tmp_path, "null.parquet"), "train")


@pytest.mark.parametrize(
    ("name", "said"), [("rows.txt", "unknown kind of file '.txt'"), ("none.csv", "does not exist"), ("folder.csv", "is no file")]
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "rows.txt").write_text("text,label\n")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError) as error:
        load_split(task(tmp_path, name), "train")
    assert said in error.value.message


def test_a_split_that_the_task_does_not_name_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no test file") as error:
        load_split(task(tmp_path, "x.csv"), "test")
    assert "[data]" in error.value.fix


def test_a_label_may_be_a_number_and_other_columns_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text('{"id": 9, "text": "x", "label": 1}\n{"id": 8, "text": "y", "label": "0"}\n')
    assert label_names(tmp_path / "n.jsonl", "text", "label") == ["0", "1"]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("Körper,Ziel\nx,a\ny,b\n")
    assert len(load_split(task(tmp_path, "r.csv", text_column="Körper", label_column="Ziel"), "train")) == 2


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbftext,label\r\nx,a\r\ny,b\r\n")
    assert load_split(task(tmp_path, "r.csv"), "train").payloads == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "labels"),
    [("text\nx\ny\n", None), ("text,label\nx,a\ny,b\n", [0, 1]), ("text,label\nx,a\ny,unheard of\n", None)],
)
def test_a_stream_may_lack_labels_or_know_others(tmp_path: Path, content: str, labels: list[int] | None) -> None:
    (tmp_path / "s.csv").write_text(content)
    split = load_split(task(tmp_path, "x.csv", stream="s.csv"), "stream")
    assert split.payloads == ["x", "y"]
    assert (None if split.labels is None else split.labels.tolist()) == labels


def test_only_a_stream_may(tmp_path: Path) -> None:
    assert "no column 'label'" in failure(tmp_path, "rows.csv", b"text\nx\n", "test").message


def test_calibration_may_hold_one_class(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,label\nx,a\n")
    assert load_split(task(tmp_path, "x.csv", calibration="c.csv"), "calibration").y.tolist() == [0]


def test_a_part_of_a_split() -> None:
    whole = Split("s", ["x", "y", "z"], np.array([0, 1, 0]))
    part = whole.take([2, 0])
    assert (part.payloads, part.y.tolist(), len(part)) == (["z", "x"], [0, 0], 2)
    assert Split("s", ["x", "y"], None).take([1]).labels is None
