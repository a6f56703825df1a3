"""A KAN judge drawn: its strongest edges, and what each input does to C_x. No display, and none of pyplot's global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.kan import Float64
from training.kan_look import Edge, Effect, unit

# Okabe & Ito's palette: told apart with any colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_INK, _FAINT, _DATA = "#2B3440", "#8A94A0", "#DCE3EA"
_STYLE: Any = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_BINS = 24
_DATA_HEIGHT = 0.25  # of a panel, for the data below the curve
_PROBABILITIES = (1.0, 0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 0.2, 0.05, 0.02, 0.005, 0.002)  # the roundest first: they win a place
_WORDS = (1, 10, 100, 1000, 3, 30, 300, 3000, 2, 5, 20, 50, 200, 500)


def draw_edges(edges: Sequence[Edge], names: list[list[str]], title: str) -> Figure:
    """One panel for each edge, in the order given; curves into one layer share their scale."""
    with rc_context(_STYLE):
        figure, panels = _panels(len(edges), title, "What an edge adds to the logit of its outcome, around its mean. " + _legend(names))
        for place, (axes, edge) in enumerate(zip(panels, edges, strict=True)):
            source, target = names[edge.layer][edge.input], names[edge.layer + 1][edge.output]
            into_last = edge.layer == len(names) - 2
            colour = _GREEN if not into_last else _BLUE if edge.output == 0 else _ORANGE
            _below(axes, edge.data)
            axes.axhline(0, color=_FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.plot(edge.x, edge.y, color=colour, linewidth=2.2, solid_capstyle="round")
            alike = np.concatenate([e.y for e in edges if e.layer == edge.layer])
            room = 0.06 * max(float(np.ptp(alike)), 1e-6)
            _scale(axes, float(alike.min()) - room, float(alike.max()) + room)
            _title(axes, f"{source} → {target}", f"{edge.share:.1%}")
            _ticks(axes, source)
            if place % 4 == 0:
                axes.set_ylabel("adds, nats" if into_last else "adds")
            else:
                axes.set_yticklabels([])
        return figure


def draw_effects(effects: Sequence[Effect], names: list[list[str]], title: str) -> Figure:
    """One panel for each input of the judge: how C_x changes with it."""
    with rc_context(_STYLE):
        about = "Change of C_x when all samples get this input and keep the rest. Band: the middle half of them; bars: where they lie."
        figure, panels = _panels(len(effects), title, about)
        low = min(float(e.low.min()) for e in effects)
        high = max(float(e.high.max()) for e in effects)
        room = 0.06 * max(high - low, 1e-4)
        for place, (axes, effect) in enumerate(zip(panels, effects, strict=True)):
            _below(axes, effect.data)
            axes.axhline(0, color=_FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.fill_between(effect.x, 100 * effect.low, 100 * effect.high, color=_BLUE, alpha=0.2, linewidth=0)
            axes.plot(effect.x, 100 * effect.mean, color=_BLUE, linewidth=2.2, solid_capstyle="round")
            _scale(axes, 100 * (low - room), 100 * (high + room))
            _title(axes, names[0][effect.input], f"± {100 * effect.spread:.1f}")
            _ticks(axes, names[0][effect.input])
            if place % 4 == 0:
                axes.set_ylabel("change of C_x, points")
            else:
                axes.set_yticklabels([])
        return figure


def _legend(names: list[list[str]]) -> str:
    into = "Blue: into rank 1, which C_x reads; orange: into the other outcomes"
    hidden = "; green: into hidden nodes" if len(names) > 2 else ""
    return f"{into}{hidden}. Bars: where the samples lie."


def _panels(count: int, title: str, about: str) -> tuple[Figure, list[Axes]]:
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(2.9 * columns, 8.2), 2.15 * rows + 0.75), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(about, x=0.01, ha="left", fontsize=8.5, color=_FAINT)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.05)  # type: ignore[union-attr,call-arg]
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _below(axes: Axes, data: Float64) -> None:
    """The data's distribution along the bottom of the panel."""
    counts, edges = np.histogram(data, _BINS)
    height = _DATA_HEIGHT * 0.85 * counts / max(1, counts.max())
    axes.bar(edges[:-1], height, np.diff(edges), align="edge", color=_DATA, transform=axes.get_xaxis_transform(), zorder=0)


def _scale(axes: Axes, low: float, high: float) -> None:
    """The vertical axis from low to high, with room below it for the data."""
    axes.set_ylim(low - (high - low) * _DATA_HEIGHT / (1 - _DATA_HEIGHT), high)
    axes.set_yticks([tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high])


def _title(axes: Axes, left: str, right: str) -> None:
    axes.set_title(left, loc="left", fontsize=9, fontweight="bold")
    axes.set_title(right, loc="right", fontsize=9, color=_FAINT)


def _ticks(axes: Axes, name: str) -> None:
    """Logarithms are labelled by what they are of: probabilities, and words."""
    low, high = axes.dataLim.intervalx
    places: list[tuple[float, str]] = []
    if name.startswith("ln p"):
        axes.set_xlabel(f"probability of {name.removeprefix('ln p, ')}")
        places = [(float(np.log(p)), f"{p:g}") for p in _PROBABILITIES]
    elif name == "ln(1 + length)":
        axes.set_xlabel("words")
        places = [(float(np.log1p(n)), str(n)) for n in _WORDS]
    else:
        axes.set_xlabel(unit(name))
    kept: list[tuple[float, str]] = []
    for place, label in places:
        if low - 0.01 <= place <= high + 0.01 and all(abs(place - other) > 0.17 * (high - low) for other, _ in kept):
            kept.append((place, label))
    if len(kept) >= 2:
        axes.set_xticks([place for place, _ in kept], [label for _, label in kept])
    else:
        if places:
            axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(4))
