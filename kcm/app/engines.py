"""`kcm export --engine`: TensorRT engines of a bundle, built ahead of time or on this machine's GPU, into the cache that the edge reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from kcm.app.progress import Steps
from kcm.errors import ConfigError, EngineError

ENGINES = ("tensorrt", "tensorrt-rtx")


def check_engine(engine: str, targets: Sequence[str]) -> None:
    """What can be said before the export.

    Raises:
        ConfigError: an unknown engine or target, or targets for an engine that has none.
        EngineError: it has to be built on a GPU, and there is none.
        MissingExtraError: the library isn't installed.
    """
    from edge_runtime.engines.compile import Flavour, module_of
    from edge_runtime.engines.cuda import why_no_device
    from edge_runtime.engines.tensorrt import TensorRTBackend

    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r} can't be built", fix=f"one of {', '.join(ENGINES)}; the others need no building")
    if engine == "tensorrt" and targets:
        raise ConfigError("--target is TensorRT-RTX's: TensorRT builds for the GPU that it runs on", fix="--engine tensorrt-rtx")
    if not targets and (why := why_no_device()):
        elsewhere = "--target sm89   builds for a GPU that isn't here"
        fix = elsewhere if engine == "tensorrt-rtx" else "run kcm edge on the device: it builds there"
        raise EngineError(f"--engine {engine} builds for this machine's GPU: {why}", fix=fix)
    backend = TensorRTBackend(cast(Flavour, engine))
    module_of(backend.name)
    for target in targets:
        backend.check_target(target)


def build_engines(bundle: Path, engine: str, targets: Sequence[str], steps: Steps) -> list[dict[str, Any]]:
    """Every precision of the bundle for every target; what was built, a line each.

    Raises:
        EngineError: the builder refused one; the message holds its own words.
    """
    from edge_runtime.engines.compile import Flavour
    from edge_runtime.engines.cuda import device
    from edge_runtime.engines.plans import PlanCache
    from edge_runtime.engines.tensorrt import TensorRTBackend
    from kcm.bundle import load_bundle

    loaded = load_bundle(bundle)
    graph = loaded.manifest.graph
    wanted = [(precision, target) for precision in loaded.manifest.precisions for target in targets or ("",)]
    backend = TensorRTBackend(cast(Flavour, engine), cache=PlanCache(keep=max(16, len(wanted))), again=True)
    lines = []
    for precision, target in wanted:
        steps(f"{engine}: {precision}" + (f" for {target}" if target else ""))
        model = loaded.model(precision)
        line: dict[str, Any] = {"engine": engine, "precision": precision}
        if target:
            made = backend.build_ahead(model, graph, target)
            line |= {"target": made.key.target, "version": made.key.version, "bytes": made.size, "seconds": made.seconds, "executed": False}
        else:
            backend.prepare(model, graph)
            backend.load(model, graph, len(loaded.task.labels)).close()
            line |= {"target": device().target, "loaded": True}
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """For a reader."""
    shown = [f"{'engine':14} {'precision':10} {'target':8} {'MB':>7} {'s':>6}"]
    for line in lines:
        size = f"{line['bytes'] / 1e6:7.1f} {line['seconds']:6.2f}" if "bytes" in line else f"{'loaded':>14}"
        shown.append(f"{line['engine']:14} {line['precision']:10} {line['target']:8} {size}")
    if any(line.get("executed") is False for line in lines):
        shown.append(
            "built by TensorRT-RTX's ahead-of-time builder, never executed here; kcm edge on such a GPU finds them in this cache folder"
        )
    return "\n".join(shown)
