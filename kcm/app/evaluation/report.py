"""The evaluation as JSON, as a table, and as one self-contained report.html."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from training.plots import draw, png, svg
from training.protocol import CPT, OURS, PAIRED

Json = dict[str, Any]
RESULT = "eval.json"


def titles(result: Json) -> dict[str, str]:
    """What each system is called in tables and plots."""
    ours = "KCM" if result["judge"] == "kan" else "MCM"
    named = {
        OURS: ours if result["head"] == "confidence" else f"{ours} ({result['head']})",
        "confidence": "the judge's C_x",
        "mlp": "MLP judge, equal size",
        "kan": "KAN judge, equal size",
        "tempered": "max-softmax, tempered",
        "max-softmax": "max-softmax",
        "entropy": "entropy",
        "margin": "margin",
        "length": f"prompt length ({result['length_escalates']} up first)",
        "random": "random, 20 draws",
        "oracle": "oracle (reads the labels)",
    }
    return {name: named[name] for name in result["systems"]}


def write(folder: Path, result: Json) -> None:
    """eval.json, plots/*.png and report.html."""
    names = titles(result)
    (folder / "plots").mkdir()
    figures = []
    for name, (figure, note) in draw(result, names).items():
        png(figure, folder / "plots" / f"{name}.png")
        figures.append((name.replace("-", " ").capitalize(), svg(figure), note))
    template = files("kcm.app.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(percent=percent, plain=plain, thousandth=thousandth, points=points)
    page = environment.from_string(template).render(r=result, titles=names, figures=figures, paired_rates=PAIRED, cpts=CPT)
    (folder / "report.html").write_text(page, encoding="utf-8")
    # Last: a folder without it is unfinished.
    (folder / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def percent(figure: Json | float | None, digits: int = 1) -> str:
    """A share in percent: "86.4 ± 0.2" of several runs, "86.4 [85.0, 87.9]" of one."""
    return _cell(figure, 100, digits)


def plain(figure: Json | float | None, digits: int = 3) -> str:
    return _cell(figure, 1, digits)


def thousandth(figure: Json) -> str:
    return _cell(figure, 1000, 1)


def _cell(figure: Json | float | None, scale: float, digits: int) -> str:
    if not isinstance(figure, dict):
        return "–" if figure is None else f"{scale * figure:.{digits}f}"
    if figure["mean"] is None:
        return "–"
    text = f"{scale * figure['mean']:.{digits}f}"
    if figure["sd"] is not None:
        return f"{text} ± {scale * figure['sd']:.{digits}f}"
    return text if figure["low"] is None else f"{text} [{scale * figure['low']:.{digits}f}, {scale * figure['high']:.{digits}f}]"


def points(difference: Json) -> str:
    return f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"


_RECALLED = {"small": "small model", "large": "large model", "at_epsilon": "at the run's ε"}


def table(result: Json) -> str:
    """For a terminal."""
    names, point, bytes_up = titles(result), result["operating_point"], result["bytes_up"]
    reference = result["references"]
    runs = len(result["runs"])
    width = max(map(len, names.values())) + 1
    lines = [
        f"task {result['task']}: {runs} run(s), {result['samples']['test']} test samples, large model {result['large']['teacher_id']}",
        f"always small {percent(reference['always-small']['accuracy'])}   always large {percent(reference['always-large']['accuracy'])}   "
        f"at the run's ε {percent(point['accuracy'])} with {percent(point['calls'])} % calls",
        "",
        f"{'accuracy in %, ε for calls of':{width}}"
        + "".join(f"{rate:>16.0%}" for rate in PAIRED)
        + f"{'APGR':>16}{'CPT50':>14}{'AUROC':>16}",
    ]
    for name, system in result["systems"].items():
        at = {target["target"]: target["accuracy"] for target in system["targets"]}
        cells = [f"{_short(at[rate], 100, 2):>16}" for rate in PAIRED]
        lines.append(
            f"{names[name]:{width}}"
            + "".join(cells)
            + f"{_short(system['apgr_exact'], 1, 3):>16}{_short(system['cpt50'], 100, 1):>14}{_short(system['auroc'], 1, 3):>16}"
        )
    lines += ["", f"{names[OURS]} minus, in points, paired, 95 %"]
    for name, rates in result["paired"].items():
        if name != "oracle":
            lines.append(f"{names[name]:{width}}" + "".join(f"{points(rates[f'{rate:g}']['calibrated']):>24}" for rate in PAIRED))
    for name, places in (result.get("recall") or {}).items():
        recalls = "   ".join(f"R@{k} {percent(places[k])}" for k in places)
        lines.append(f"{_RECALLED[name]:{width}} {recalls}")
    latency = result["latency"]
    lines += ["", f"local {_path(latency['local'])}; cloud {_path(latency['cloud'])}; {latency['machine']}"]
    if bytes_up["p50_per_sample"] is not None:
        each, all_ = bytes_up["p50_per_sample"], bytes_up["per_1000_requests"]
        lines.append(f"{each:.0f} bytes a sample that goes up (p50), {all_:.0f} per 1,000 requests at ε")
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def _short(figure: Json, scale: float, digits: int) -> str:
    """Without the interval: a terminal's line is short."""
    return _cell({**figure, "low": None, "high": None}, scale, digits)


def _path(found: Json | None) -> str:
    return "not measured" if found is None else f"p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms ({found['samples']} samples)"
