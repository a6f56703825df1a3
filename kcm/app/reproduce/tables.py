"""The tables as text: rows in the paper's order, ours with mean ± sd over seeds, the paper's figure beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kcm.app.reproduce import paper
from kcm.app.reproduce.cells import AT, METHODS, Cell
from kcm.app.reproduce.plan import Part, Table

Done = Mapping[str, Sequence[Cell]]  # cells of each part by its name
_ROWS = ("large", "small", *METHODS)
_SAYS = {
    "large": "large model alone",
    "small": "small model alone, round 0",
    "d": "+D, small model alone",
    "kd": "+KD, small model alone",
    "mcm": f"+MCM at {AT:.0%} calls",
    "kcm": f"+KCM at {AT:.0%} calls",
}
_GROUPS = ("many", "medium", "few")


def table(shown: Table, done: Done, absent: Mapping[str, str]) -> list[str]:
    """A table's lines. Parts that weren't run say why."""
    parts = [part for part in shown.parts if done.get(part.name)]
    lines = [f"## {shown.title}", ""]
    if parts:
        lines += {"vision": _vision, "multimodal": _recall}.get(shown.name, _accuracy)(parts, done, shown)
        lines += ["", *(_difference(part, done[part.name]) for part in parts)]
        lines += [f"{part.title}: {part.differs}." for part in parts]
        if shown.name == "vision":
            lines += ["Many, medium, few: thirds of the classes by their rows; in the literature more than 100 rows, 20 to 100, fewer."]
    lines += [f"{part.title} wasn't run: {absent[part.name]}" for part in shown.parts if absent.get(part.name)]
    return [*lines, ""]


def ablation(done: Done, tables: Sequence[Table]) -> list[str]:
    """MCM against KCM over all that was run, paired."""
    lines = ["## Ablation: KAN (KCM) against an MLP of as many parameters (MCM)", ""]
    head = ["", *paper.ABLATED, *(part.title for t in tables for part in t.parts if done.get(part.name))]
    names = [part.name for t in tables for part in t.parts if done.get(part.name)]
    rows = []
    for method in ("mcm", "kcm"):
        ours = [_cell([_routed(cell) for cell in _of(done[name], method)]) for name in names]
        rows.append([method.upper(), *(f"paper {value:.2f}" for value in paper.ABLATION[method]), *ours])
    gap = [_paired(_pairs(done[name], "kcm", "mcm"), "kcm") for name in names]
    rows.append(["KCM − MCM", *(f"paper {b - a:+.2f}" for a, b in zip(paper.ABLATION["mcm"], paper.ABLATION["kcm"], strict=True)), *gap])
    return [*lines, *_grid(head, rows), ""]


def _accuracy(parts: Sequence[Part], done: Done, shown: Table) -> list[str]:
    model, printed = next(iter(shown.rows.items()))
    head = ["", *(part.title for part in parts), "mean", f"paper, {model} on APD"]
    rows = []
    for name in _ROWS:
        values = [_values(done[part.name], name) for part in parts]
        means = [float(np.mean(column)) for column in values]
        said = f"{printed[name][-1]:.2f}" if name in printed else ""
        rows.append([_SAYS[name], *map(_cell, values), f"{100 * np.mean(means):.2f}", said])
    return _grid(head, rows)


def _vision(parts: Sequence[Part], done: Done, shown: Table) -> list[str]:
    head = ["", *shown.columns, "paper: " + " / ".join(shown.columns)]
    rows = []
    for part in parts:
        printed = shown.rows.get(part.title, {})
        for name in _ROWS:
            cells = done[part.name]
            groups = [_cell([_group(cell, name, group) for cell in _rows_of(cells, name)]) for group in _GROUPS]
            said = " / ".join(f"{value:.1f}" for value in printed[name]) if name in printed else ""
            rows.append([f"{part.title}: {_SAYS[name]}", *groups, _cell(_values(cells, name)), said])
    return _grid(head, rows)


def _recall(parts: Sequence[Part], done: Done, shown: Table) -> list[str]:
    printed = next(iter(shown.rows.values()))
    ranks = ("1", "5", "10")
    rows = []
    for name in _ROWS:
        ours = [_cell([_recalled(cell, name, rank) for cell in _rows_of(done[part.name], name)]) for part in parts for rank in ranks]
        rows.append([_SAYS[name], *ours, " / ".join(f"{value:.1f}" for value in printed[name]) if name in printed else ""])
    head = ["", *(f"{part.title} R@{rank}" for part in parts for rank in ranks), "paper: " + " / ".join(shown.columns)]
    return _grid(head, rows)


def _of(cells: Sequence[Cell], method: str) -> list[Cell]:
    return [cell for cell in cells if cell.method == method]


def _rows_of(cells: Sequence[Cell], name: str) -> list[Cell]:
    """The cells that a row is made of: those of its method; of the models alone any method's, they are the same."""
    return _of(cells, name if name in METHODS else METHODS[-1]) or _of(cells, METHODS[0])


def _values(cells: Sequence[Cell], name: str) -> list[float]:
    rows = _rows_of(cells, name)
    if name == "large":
        return [cell.last["large_accuracy"] for cell in rows]
    if name == "small":
        return [cell.first["small_accuracy"] for cell in rows]
    return [_routed(cell) if name in ("mcm", "kcm") else cell.last["small_accuracy"] for cell in rows]


def _routed(cell: Cell) -> float:
    return float(cell.last["curve"][str(AT)]["accuracy"])


def _group(cell: Cell, name: str, group: str) -> float:
    system = {"large": "large", "mcm": "kcm", "kcm": "kcm"}.get(name, "small")
    return float((cell.first if name == "small" else cell.last)["groups"][system].get(group, float("nan")))


def _recalled(cell: Cell, name: str, rank: str) -> float:
    system = {"large": "large", "mcm": "kcm", "kcm": "kcm"}.get(name, "small")
    return float((cell.first if name == "small" else cell.last)["recall"][system][rank])


def _pairs(cells: Sequence[Cell], one: str, other: str) -> list[tuple[Cell, Cell]]:
    seeds = {cell.seed: cell for cell in _of(cells, other)}
    return [(cell, seeds[cell.seed]) for cell in _of(cells, one) if cell.seed in seeds]


def _paired(pairs: Sequence[tuple[Cell, Cell]], answers: str) -> str:
    from training.evaluate import paired_interval

    if not pairs:
        return "–"
    mean, low, high = paired_interval(np.array([a.answers(answers).astype(float) - b.answers(answers) for a, b in pairs]))
    return f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _difference(part: Part, cells: Sequence[Cell]) -> str:
    found = [f"KCM − {name.upper()} {_paired(_pairs(cells, 'kcm', name), 'kcm')}" for name in METHODS[:-1]]
    calls = np.mean([cell.last["curve"][str(AT)]["realised_rate"] for cell in _of(cells, "kcm")] or [float("nan")])
    seeds = {cell.seed for cell in cells}
    seconds = sum(cell.seconds for cell in cells)
    return f"{part.title}, all at {AT:.0%} calls (KCM made {calls:.1%}): {', '.join(found)}; {len(seeds)} seed(s), {seconds:.0f} s."


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table that also reads well as it is."""
    lines = [list(map(str, head)), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return [text[0], "| " + " | ".join("-" * max(3, width) for width in widths) + " |", *text[1:]]
