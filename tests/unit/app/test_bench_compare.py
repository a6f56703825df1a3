"""`kcm bench compare` on files as `kcm bench edge` writes them: what is worse, what is noise, what isn't comparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kcm.app.bench.figures import KIND, RATIOS, SCHEMA, Ratio, holds, ratios

Kcm = Callable[..., tuple[int, str, str]]
BUNDLE = {"bundle_id": "b1", "task_id": "r52", "label_space": "s"}
MACHINE = {"cpu": "a CPU", "cores": 2, "arch": "x86_64"}


def at(median: float, half: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - half), "high": median * (1 + half)}


def write(
    path: Path,
    /,
    bundle: dict[str, str] | None = None,
    machine: dict[str, Any] | None = None,
    repeats: int = 15,
    **figures: dict[str, float],
) -> Path:
    """A file with every ratio at 2, and `figures` instead."""
    single = {"rss_mb": at(120), "cold_start_s": at(1.5)}
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "repeats": repeats,
        "ratios": {name: figures.get(name, at(2)) for name in RATIOS},
        "spread": {name: figures.get(name, value) for name, value in single.items()},
        "bundle": {**BUNDLE, **(bundle or {})},
        "machine": {**MACHINE, **(machine or {})},
        "date": "2026-11-24T15:00:00Z",
    }
    path.write_text(json.dumps(content))
    return path


def verdicts(kcm: Kcm, *arguments: object) -> tuple[int, dict[str, str]]:
    code, out, _ = kcm("bench", "compare", *arguments, "--json")
    said = json.loads(out)
    found = {name: change["verdict"] for name, change in said["changes"].items() if change["verdict"]}
    assert said["regressions"] == [name for name, verdict in found.items() if verdict == "worse"]
    return code, found


def test_the_same_figures_are_no_regression(kcm: Kcm, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    assert verdicts(kcm, a, b) == (0, {})
    code, out, _ = kcm("bench", "compare", a, b)
    assert code == 0 and "nothing is worse" in out and all(name in out for name in RATIOS)


def test_what_moved_beyond_noise_and_tolerance_is_worse_and_exits_6(kcm: Kcm, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json")
    b = write(tmp_path / "b.json", decision_over_run=at(2.4), judge_over_mlp_b1=at(1.5), rss_mb=at(140))
    assert verdicts(kcm, a, b) == (6, {"decision_over_run": "worse", "judge_over_mlp_b1": "better", "rss_mb": "worse"})
    code, out, _ = kcm("bench", "compare", a, b)
    assert code == 6 and "worse: decision_over_run, rss_mb" in out
    (line,) = [line for line in out.splitlines() if line.startswith("decision_over_run")]
    assert "2.000 [1.960, 2.040]" in line and "2.400 [2.352, 2.448]" in line and line.endswith("1.20  worse")


def test_less_is_worse_where_more_is_better(kcm: Kcm, tmp_path: Path) -> None:
    more = {name for name, spec in RATIOS.items() if spec.at_least}
    assert more == {"effkan_over_judge_b1", "stream_over_unary_rps"}
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", **{name: at(1.5) for name in more})
    assert verdicts(kcm, a, b) == (6, dict.fromkeys(sorted(more), "worse"))
    assert verdicts(kcm, b, a) == (0, dict.fromkeys(sorted(more), "better"))


@pytest.mark.parametrize("after", [at(2.4, 0.2), at(2.18)], ids=["middle halves that meet", "less than the tolerance"])
def test_noise_and_small_moves_are_not_judged(kcm: Kcm, tmp_path: Path, after: dict[str, float]) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", decision_over_run=after)
    assert verdicts(kcm, a, b) == (0, {})
    assert verdicts(kcm, b, a) == (0, {})


def test_the_tolerance_can_be_set(kcm: Kcm, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", decision_over_run=at(2.18))
    assert verdicts(kcm, a, b, "--tolerance", 0.05) == (6, {"decision_over_run": "worse"})
    assert verdicts(kcm, a, write(tmp_path / "c.json", decision_over_run=at(2.4)), "--tolerance", 0.3) == (0, {})


def test_a_slow_start_alone_is_shown_and_not_judged(kcm: Kcm, tmp_path: Path) -> None:
    """Wall time: it hangs on who else is busy."""
    assert verdicts(kcm, write(tmp_path / "a.json"), write(tmp_path / "b.json", cold_start_s=at(9))) == (0, {})


@pytest.mark.parametrize(("before", "after", "said"), [(1, 15, "A has"), (15, 1, "B has"), (1, 1, "A has"), (2, 2, "")])
def test_a_file_of_one_repeat_has_no_spread_and_a_warning_says_so(kcm: Kcm, tmp_path: Path, before: int, after: int, said: str) -> None:
    a, b = write(tmp_path / "a.json", repeats=before), write(tmp_path / "b.json", repeats=after, decision_over_run=at(3, 0))
    code, out, err = kcm("bench", "compare", a, b)
    assert code == 6 and "worse: decision_over_run" in out
    assert err == "" if not said else f"warning: {said} one repeat: no spread tells noise from change" in err and "--repeats 15" in err
    assert (before, after) != (1, 1) or "; B has one repeat" in err
    warning = json.loads(kcm("bench", "compare", a, b, "--json")[1])["warning"]
    assert warning == "" if not said else said in warning


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"machine": {"cpu": "another"}}, "other machines: a CPU with 2 cores, another with 2"),
        ({"machine": {"cores": 64}}, "a CPU with 64"),
        ({"bundle": {"task_id": "clinc150"}}, "r52 (b1), clinc150 (b1)"),
        ({"bundle": {"label_space": "t"}}, "other tasks or labels"),
    ],
)
def test_what_is_not_comparable_is_shown_with_a_warning_and_not_judged(kcm: Kcm, tmp_path: Path, other: dict[str, Any], said: str) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", decision_over_run=at(9), **other)
    code, out, err = kcm("bench", "compare", a, b)
    assert code == 0 and err.startswith("warning: ") and said in err and "nothing is worse" not in out and "9.000" in out
    assert verdicts(kcm, a, b) == (0, {})


def test_another_bundle_of_the_same_task_is_judged(kcm: Kcm, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", bundle={"bundle_id": "b2"}, decision_over_run=at(3))
    assert verdicts(kcm, a, b) == (6, {"decision_over_run": "worse"})


def test_folders_of_out_are_taken_too(kcm: Kcm, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "edge.json")
    assert verdicts(kcm, tmp_path / "before", tmp_path / "after") == (0, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no result of kcm bench edge"),
        (json.dumps({"schema": 1, "systems": []}), "is no result of kcm bench edge"),
        (json.dumps({"schema": SCHEMA + 1, "kind": KIND}), f"has schema {SCHEMA + 1}, this kcm reads {SCHEMA}"),
        (json.dumps({"schema": SCHEMA, "kind": KIND, "ratios": {"decision_over_run": {"median": "x"}}}), "ratios"),
    ],
)
def test_another_file_is_an_error(kcm: Kcm, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "b.json").write_text(content)
    code, out, err = kcm("bench", "compare", write(tmp_path / "a.json"), tmp_path / "b.json")
    assert code == 4 and out == "" and said in err and "b.json" in err and "fix: " in err


def test_a_missing_file_is_an_error(kcm: Kcm, tmp_path: Path) -> None:
    code, _, err = kcm("bench", "compare", tmp_path / "none.json", write(tmp_path / "b.json"))
    assert code == 4 and "none.json can't be read" in err


def test_a_ratio_is_taken_repeat_by_repeat() -> None:
    """A machine that is ten times slower in one repeat moves both sides, not the ratio."""
    rows = [{"a": 3.0, "b": 2.0}, {"a": 30.0, "b": 20.0}, {"a": 3.3, "b": 2.0}]
    found = ratios({"x": Ratio("a", "b"), "absent": Ratio("a", "c")}, rows)
    assert set(found) == {"x"}
    assert found["x"]["low"] == found["x"]["median"] == pytest.approx(1.5) and found["x"]["high"] == pytest.approx(1.575)


def test_a_bar_has_a_side() -> None:
    assert holds({"at_most": 1.5}, 1.5) and not holds({"at_most": 1.5}, 1.6)
    assert holds({"at_least": 4.0}, 4.0) and not holds({"at_least": 4.0}, 3.9)
