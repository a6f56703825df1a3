"""`kcm judge show` as its users meet it: a table, two plots, JSON, a pruned run; and a clear word where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from training.evaluate import auroc
from training.judge import FEATURES, fit_judge
from training.run import Run, load_run, save_run

Kcm = Callable[..., tuple[int, str, str]]


def with_judge(run: Run, folder: Path, **changes: object) -> Path:
    """The run with another kind of judge, fitted on its own predictions, in `folder`."""
    spec = msgspec.structs.replace(run.task.judge, **changes)
    task = msgspec.structs.replace(run.task, judge=spec)
    judge = fit_judge(spec, run.out_of_fold, run.targets)
    save_run(folder, replace(run, judge=judge, info=msgspec.structs.replace(run.info, task=task)))
    return folder


def test_it_shows_every_edge_in_order_and_writes_plots_and_json(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    code, out, _ = kcm("judge", "show", str(tiny_run_dir), "--out", str(tmp_path / "look"), "--top", "4")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["edge", "share"]
    assert "56 more edges hold" in lines[5] and lines[6].startswith("trend: as the input grows, it speaks more (rising) or less (falling)")
    assert all(line.split("   ")[-2].strip() in ("rising", "falling", "mixed", "flat") for line in lines[1:5])
    for name in ("edges.png", "effects.png"):
        assert (tmp_path / "look" / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "look" / "judge.json").read_text(encoding="utf-8"))
    assert result["samples"] == 72 and result["pruned"] is None and len(result["edges"]) == 60 and len(result["effects"]) == 10
    shares = [edge["share"] for edge in result["edges"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-3)
    first = result["edges"][0]
    assert lines[1].startswith(f"{first['input']} → {first['output']}") and first["trend"] in lines[1]
    assert f"{first['share']:.1%}" in lines[1]
    assert result["nodes"][0][-5:] == list(FEATURES) and {edge["input"] for edge in result["edges"]} == set(result["nodes"][0])
    assert {edge["unit"] for edge in result["edges"] if edge["input"] == "ln(1 + length)"} == {"ln(1 + words)"}
    # What was there is an earlier look of ours: it is replaced.
    assert kcm("judge", "show", str(tiny_run_dir), "--out", str(tmp_path / "look"))[0] == 0


def test_json_is_the_file_and_the_curves_are_the_judges(kcm: Kcm, tiny_run: Run, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tiny_run)
    code, out, _ = kcm("judge", "show", str(tmp_path / "run"), "--json", "--samples", "30")
    result = json.loads(out)
    assert code == 0 and result == json.loads((tmp_path / "run" / "judge" / "judge.json").read_text(encoding="utf-8"))
    assert result["samples"] == 30
    (layer,) = tiny_run.judge.layers
    a, b = layer.scale_and_shift()
    names = result["nodes"]
    for edge in result["edges"][:10]:
        i, o = names[0].index(edge["input"]), names[1].index(edge["output"])
        curve = layer.values(np.clip(np.array(edge["x"]) * a[i] + b[i], 0, layer.grid))[o, i]
        assert np.array(edge["y"]) + edge["mean"] == pytest.approx(curve, abs=1e-4)
    load_run(tmp_path / "run")  # a look leaves the run readable


def test_pruning_reports_what_it_costs_and_saves_a_run_that_exports(kcm: Kcm, tiny_run: Run, tiny_run_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "pruned"
    code, out, _ = kcm(
        "judge", "show", str(tiny_run_dir), "--prune", "0.02", "--save", str(saved), "--out", str(tmp_path / "look"), "--json"
    )
    assert code == 0
    cut = json.loads(out)["pruned"]
    again = load_run(saved)
    change = np.abs(again.judge.confidence(tiny_run.out_of_fold) - tiny_run.judge.confidence(tiny_run.out_of_fold)).max()
    assert cut["confidence_change"] == pytest.approx(change, abs=1e-6) and change > 0
    assert 0 < cut["edges_after"] < cut["edges_before"] == 60
    assert cut["edges_after"] == int((again.judge.layers[0].base != 0).sum())
    right = tiny_run.out_of_fold.logits.argmax(1) == tiny_run.targets.argmax(1)
    before, after = (auroc(run.judge.confidence(tiny_run.out_of_fold), right) for run in (tiny_run, again))
    assert (cut["auroc_before"], cut["auroc_after"]) == pytest.approx((before, after)) and before != after
    assert again.threshold.method == "fixed" and again.threshold.epsilon == again.task.judge.epsilon, "ε was another judge's"
    assert kcm("export", str(saved), "--out", str(tmp_path / "bundle"))[0] == 0
    code, out, _ = kcm("judge", "show", str(tiny_run_dir), "--prune", "0.02", "--out", str(tmp_path / "look"))
    assert f"{cut['edges_after']} of 60 edges left at --prune 0.02: C_x moves by at most {change:.4f}; AUROC" in out
    assert np.array_equal(load_run(tiny_run_dir).judge.confidence(tiny_run.out_of_fold), tiny_run.judge.confidence(tiny_run.out_of_fold))


def test_two_layers_have_hidden_nodes(kcm: Kcm, tiny_run: Run, tmp_path: Path) -> None:
    run = with_judge(tiny_run, tmp_path / "run", hidden=3)
    code, out, _ = kcm("judge", "show", str(run), "--json")
    result = json.loads(out)
    assert code == 0 and result["nodes"][1] == ["h1", "h2", "h3"]
    for layer in (1, 2):
        assert sum(edge["share"] for edge in result["edges"] if edge["layer"] == layer) == pytest.approx(1, abs=1e-3)
    assert (run / "judge" / "edges.png").exists()


def test_an_mlp_is_3_with_the_way_out(kcm: Kcm, tiny_run: Run, tmp_path: Path) -> None:
    run = with_judge(tiny_run, tmp_path / "run", kind="mlp")
    code, out, err = kcm("judge", "show", str(run))
    assert (code, out) == (3, "") and "MLP" in err and 'fix: set kind = "kan" under [judge]' in err
    assert not (run / "judge").exists()


def test_wrong_wishes_are_refused_before_the_work(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    code, _, err = kcm("judge", "show", str(tiny_run_dir), "--save", str(tmp_path / "r"))
    assert code == 3 and "--prune" in err
    (tmp_path / "mine.txt").write_text("mine")
    assert kcm("judge", "show", str(tiny_run_dir), "--out", str(tmp_path))[0] == 3
    assert kcm("judge", "show", str(tiny_run_dir), "--prune", "0.1", "--save", str(tmp_path))[0] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert kcm("judge", "show", str(tmp_path))[0] == 3
    assert kcm("judge", "show", str(tiny_run_dir), "--prune", "2")[0] == 2
