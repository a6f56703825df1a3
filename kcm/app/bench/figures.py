"""What `kcm bench edge` reports: each ratio's two sides, and its bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

SCHEMA = 1
KIND = "bench edge"
FILE = "edge.json"


class Ratio(msgspec.Struct, frozen=True):
    """`over` ÷ `under`, two figures of one repeat. Without a bar it is told, not judged."""

    over: str
    under: str
    bar: float | None = None
    at_least: bool = False  # more is better

    @property
    def figures(self) -> tuple[str, str]:
        return self.over, self.under


# Names are a contract with the JSON's readers. Figures of a name's sides are CPU µs unless they end in _rps (requests/s).
RATIOS = {
    "decision_over_run": Ratio("decision", "run", 1.5),
    "text_decision_over_run": Ratio("text_decision", "run", 3.0),
    "judge_over_mlp_b1": Ratio("kan_b1", "mlp_b1", 1.6),
    "judge_over_mlp_b256": Ratio("kan_b256", "mlp_b256", 3.2),
    "effkan_over_judge_b1": Ratio("effkan_b1", "kan_b1", 4.0, True),
    "unary_cpu_over_empty": Ratio("unary", "empty", 1.5),
    "batch32_cpu_per_sample_over_unary": Ratio("batch32", "unary", 1 / 15),
    "batch32_text_cpu_per_sample_over_unary": Ratio("batch32_text", "unary_text", 1 / 6),
    "stream_over_unary_rps": Ratio("stream_rps", "unary_rps", 2.5, True),
}
ALSO = {
    "unary_text_cpu_over_empty": Ratio("unary_text", "empty_text"),
    "busy_unary_cpu_over_empty": Ratio("busy_unary", "busy_empty"),
    "busy_stream_cpu_over_unary": Ratio("busy_stream", "busy_unary"),
    "sklearn_over_preprocess": Ratio("sklearn", "preprocess"),
}
# Of images: what a graph costs decides most of the others, so they are told and not judged.
IMAGE_RATIOS = {
    **{name: spec for name, spec in RATIOS.items() if name == "decision_over_run" or "judge" in name},
    **{
        name: Ratio(spec.over, spec.under, at_least=spec.at_least)
        for name, spec in RATIOS.items()
        if "unary" in name and "text" not in name
    },
    "image_decision_over_run": Ratio("image_decision", "run"),
    "photo_decision_over_run": Ratio("photo_decision", "run"),
    "batch32_image_cpu_per_sample_over_unary": Ratio("batch32_image", "unary_image"),
}
IMAGE_ALSO = {
    **{name: spec for name, spec in ALSO.items() if "busy" in name},
    "unary_image_cpu_over_empty": Ratio("unary_image", "empty_image"),
}
SINGLE = {"rss_mb": 140.0, "cold_start_s": 2.0}  # at most
NODES = 10  # of the pinned two-layer judge, at most


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the middle half's ends over repeats."""
    import numpy as np

    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(specs: Mapping[str, Ratio], rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """A ratio per repeat, then its spread: what slows the machine in one repeat slows both sides. Left out where a side wasn't measured."""
    return {
        name: spread([row[spec.over] / row[spec.under] for row in rows])
        for name, spec in specs.items()
        if all(side in rows[0] for side in spec.figures)
    }


def bars(specs: Mapping[str, Ratio], single: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """As the JSON holds them: {"at_most": …} or {"at_least": …}."""
    found = {name: {"at_least" if spec.at_least else "at_most": spec.bar} for name, spec in specs.items() if spec.bar is not None}
    return {**found, **{name: {"at_most": bar} for name, bar in single.items()}, "judge_nodes": {"at_most": float(NODES)}}


def holds(bar: Mapping[str, float], value: float) -> bool:
    return value <= bar.get("at_most", value) and value >= bar.get("at_least", value)


def table(result: Mapping[str, Any]) -> str:
    """A line per figure: median, the middle half, its bar, and whether it holds."""
    bundle, machine = result["bundle"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"bundle {bundle['bundle_id']} ({bundle['source']}): task {bundle['task_id']}, {bundle['classes']} labels, "
        f"{bundle['model_mb']:.1f} MB",
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}; {versions}",
        f"{result['date']}, {result['repeats']} repeats in {result['seconds']:.0f} s, one thread; medians, the middle half in brackets",
        "",
    ]
    lines += [_line(name, found, result["bars"].get(name)) for name, found in {**result["ratios"], **result["also"]}.items()]
    lines.append(_line("judge_nodes", {"median": result["judge_nodes"]["kan"]}, result["bars"]["judge_nodes"], digits=0))
    lines += ["", *(_line(name, found, result["bars"].get(name), digits=1) for name, found in result["spread"].items())]
    lines += ["", "CPU µs per call (per sample where a call carries 32), and requests/s:"]
    lines += [_line(name, found, None, digits=1) for name, found in result["figures"].items()]
    return "\n".join(lines)


def _line(name: str, found: Mapping[str, float], bar: Mapping[str, float] | None, digits: int = 3) -> str:
    middle = f"[{found['low']:.{digits}f}, {found['high']:.{digits}f}]" if "low" in found else ""
    line = f"{name:40} {found['median']:9.{digits}f}  {middle:20}"
    if not bar:
        return line.rstrip()
    (kind, limit), *_ = bar.items()
    sign, missed = ("≤", "over") if kind == "at_most" else ("≥", "under")
    return f"{line} {sign} {limit:<7.3g} {'ok' if holds(bar, found['median']) else missed}"
