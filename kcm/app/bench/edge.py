"""`kcm bench edge`: what a decision on the device costs, each part beside its peer in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.bench.figures import ALSO, FILE, IMAGE_ALSO, IMAGE_RATIOS, KIND, RATIOS, SCHEMA, SINGLE, bars, ratios, spread, table
from kcm.app.progress import Steps

if TYPE_CHECKING:
    from kcm.bundle import Bundle

_STARTS = 5  # cold starts at most: they take a second or two each
_SINGLE = {"rss_mb": "rss_mb", "cold_start_s": "cold_start_s", "preprocess_us": "preprocess"}
_SINGLE |= {"preprocess_cold_us": "preprocess_cold", "preprocess_photo_us": "preprocess_photo"}  # of texts, of images


def edge(
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="A bundle of `kcm export`; without it, one is trained on made-up sentences.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often everything is measured, in turn.")] = 15,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for edge.json, which `kcm bench compare` reads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a decision on this machine costs beside bare parts of the same run, and the bars that it should keep.

    A decision against one session.run; the judge against an MLP and an efficient-kan-style export; a `kcm edge` process against an
    empty gRPC handler; memory, cold start, preprocessing. CPU time, one thread; ratios are taken repeat by repeat. No cloud is
    asked. A figure over its bar is a result, not an error.

    A bundle of images is given drawn pictures: as pixels, as PNG files of the size that it reads, and as a JPEG of 640 × 480.

    Try it: kcm bench edge --bundle bundle --out before
    """
    import tempfile

    from kcm.app.bench.made import SOURCE, make_bundle
    from kcm.app.folders import claim_file
    from kcm.app.models import one_thread
    from kcm.bundle import load_bundle
    from kcm.errors import require

    for module, extra in (("onnxscript", "export"), ("sklearn", "train"), ("grpc", "edge"), ("onnxruntime", "cpu")):
        require(module, extra)  # now, not after the work
    if out is not None:
        claim_file(out / FILE)
    one_thread()
    steps = Steps(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="kcm-bench-") as scratch:
        folder = bundle if bundle is not None else make_bundle(Path(scratch) / "bundle", steps)
        loaded = load_bundle(folder)
        result = measure(loaded, str(bundle) if bundle is not None else SOURCE, repeats, Path(scratch), steps)
    if out is not None:
        (out / FILE).write_text(json.dumps(result, indent=1), encoding="utf-8")
    typer.echo(json.dumps(result) if as_json else table(result))


def measure(bundle: Bundle, source: str, repeats: int, scratch: Path, steps: Steps) -> dict[str, Any]:
    """The whole result, as the JSON holds it; the first of repeats + 1 warms up."""
    from kcm.app.bench.decision import Decisions
    from kcm.app.bench.judge_graphs import JudgeGraphs
    from kcm.app.bench.serving import serving, start_up

    steps(f"bundle {bundle.manifest.bundle_id}, task {bundle.manifest.task_id}; loading the judge's graphs")
    judge, decisions = JudgeGraphs(), Decisions(bundle)
    images = bundle.task.modality == "image"
    specs, also = (IMAGE_RATIOS, IMAGE_ALSO) if images else (RATIOS, ALSO)
    rows: list[dict[str, float]] = []
    starts: list[dict[str, float]] = []
    steps("starting kcm edge and an empty handler")
    with serving(bundle, scratch, decisions.run_s) as served:
        for repeat in range(repeats + 1):
            row = decisions.measure() | judge.measure() | served.measure()
            if not repeat:
                continue
            rows.append(row)
            if repeat <= _STARTS:
                starts.append(start_up(bundle, scratch))
            steps(
                f"repeat {repeat} of {repeats}: unary {row['unary']:.0f} µs against {row['empty']:.0f}, decision {row['decision']:.0f} µs"
            )
    found = {name: [row[key] for row in (*rows, *starts) if key in row] for name, key in _SINGLE.items()}
    singles = {name: spread(values) for name, values in found.items() if values}
    singles["cold_start_cpu_s"] = spread([start["cold_start_cpu_s"] for start in starts])
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "ratios": ratios(specs, rows),
        "also": ratios(also, rows),
        **{name: single["median"] for name, single in singles.items()},
        "spread": singles,
        "judge_nodes": judge.nodes,
        "figures": {key: spread([row[key] for row in rows]) for key in rows[0]},
        # Memory's bar is of a text graph: an image net's own may be larger.
        "bars": bars(specs, {name: bar for name, bar in SINGLE.items() if not images or name != "rss_mb"}),
        "bundle": _described(bundle, source),
        "machine": _machine(),
        "versions": _versions(),
        "date": _now(),
        "repeats": repeats,
        "threads": 1,
        "seconds": round(steps.seconds, 1),
    }


def _described(bundle: Bundle, source: str) -> dict[str, Any]:
    manifest, size = bundle.manifest, len(bundle.model("fp32"))
    names = {"bundle_id": manifest.bundle_id, "task_id": manifest.task_id, "label_space": manifest.label_space}
    return {"source": source, **names, "classes": len(bundle.task.labels), "model_mb": size / 1e6}


def _machine() -> dict[str, Any]:
    import os
    import platform

    return {"cpu": _cpu_name() or platform.machine(), "cores": os.cpu_count() or 0, "arch": platform.machine(), "load": os.getloadavg()[0]}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")), "")


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    names = ("kcm", "onnxruntime", "grpcio", "protobuf", "numpy", "msgspec", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _now() -> str:
    import time

    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
