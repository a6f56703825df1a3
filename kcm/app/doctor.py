"""`kcm doctor`: what this machine has, which engines can run here, and why the others can't."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Annotated, Any

import typer

from kcm.errors import ConfigError, EngineError

# By extra, what tells that it is installed.
_EXTRAS = {
    "edge": ("grpcio", "apsw", "tokenizers"),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "cuda-bindings"),
    "train": ("torch", "transformers", "scikit-learn"),
    "export": ("torch", "onnx"),
    "cloud": ("torch", "transformers", "grpcio"),
}
_OURS = ("kcm", "training", "export", "edge_runtime", "cloud_server", "protos")


def doctor(
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Also load this bundle, as `kcm edge` would.")] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAMES", help="Only these, with commas; with --bundle in order of preference.")
    ] = "auto",
    precision: Annotated[str | None, typer.Option("--precision", help="With --bundle: fp32, fp16 or int8; default fp32.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What is installed, which engines can run the graph here, and why not the others. Changes nothing, asks no network.

    With --bundle: what was requested against what really runs it. Exit code 10 where no engine can, 5 where the bundle is refused.

    Try it: kcm doctor
            kcm doctor --bundle bundle --engine tensorrt,onnx-cpu
    """
    if bundle is None and precision is not None:
        raise ConfigError("--precision says which model of a bundle to load", fix="add --bundle DIR")
    report: dict[str, Any] = {
        "kcm": version("kcm"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "extras": {name: _installed(names) for name, names in _EXTRAS.items()},
        "problems": _problems(),
        "engines": _engines(engine),
        "failed_builds": _failed_builds(),
    }
    if bundle is not None:
        report["bundle"] = _loaded(bundle, engine, precision or "fp32")
    typer.echo(json.dumps(report) if as_json else _text(report))


def _installed(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version by distribution; None: not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _problems() -> list[str]:
    found = []
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed((name,))[name]]
    if len(both) == 2:
        found.append("onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall both, then install kcm[cpu] or kcm[gpu]")
    owners = packages_distributions()
    for name in _OURS:
        others = sorted(set(owners.get(name, [])) - {"kcm"})
        if others:
            found.append(f"the top-level package {name!r} belongs to {', '.join(others)} too: give kcm an environment of its own")
    return found


def _engines(asked: str) -> list[dict[str, str]]:
    """In the order of "auto" and then the rest, or those asked for: name, and why it can't run here (empty: it can)."""
    try:
        from edge_runtime.engines.chain import BACKENDS, named
    except ModuleNotFoundError as missing:
        return [{"name": "all", "reason": f"{missing.name} is not installed; fix: pip install 'kcm[edge,cpu]'"}]
    names = ["auto", *BACKENDS] if asked == "auto" else [name.strip() for name in asked.split(",")]
    return [{"name": backend.name, "reason": backend.probe()} for backend in named(names)]


def _failed_builds() -> list[dict[str, str]]:
    """Engines whose building failed here: `kcm edge` doesn't try again while `file` is there."""
    try:
        from edge_runtime.engines.plans import PlanCache
    except ModuleNotFoundError:  # no extra edge: the engines' list says so
        return []
    cache = PlanCache()
    try:
        failures = cache.failures()
    except EngineError:  # a folder that no engine can use: what each of them says
        return []
    return [
        {
            "engine": failure.key.flavour,
            "version": failure.key.version,
            "target": failure.key.target,
            "model": failure.key.model,
            "date": failure.created,
            "reason": failure.reason,
            "file": str(cache.failure_file(failure.key)),
        }
        for failure in failures
    ]


def _loaded(bundle: Path, engine: str, precision: str) -> dict[str, Any]:
    from edge_runtime.loader import Loader
    from kcm.bundle import as_precision

    loader = Loader(engine, as_precision(precision))
    runtime = loader.load(bundle)
    return {
        "bundle_id": runtime.bundle_id,
        "precision": runtime.precision,
        "requested": engine,
        "runs": runtime.provider,
        "to_be_built": [backend.name for backend in loader.better(runtime)],
        "skipped": {skip.name: skip.reason for skip in loader.skipped},
    }


def _text(report: dict[str, Any]) -> str:
    lines = [f"kcm {report['kcm']}, Python {report['python']}, {report['machine']}", "", "extras"]
    for name, found in report["extras"].items():
        missing = [part for part, at in found.items() if at is None]
        said = ", ".join(f"{part} {at}" for part, at in found.items()) if not missing else f"not installed: {', '.join(missing)}"
        lines.append(f"  {name:13} {said}")
    lines += ["", "engines, in order"]
    lines += [f"  {at['name']:13} {'can run here' if not at['reason'] else at['reason']}" for at in report["engines"]]
    for at in report["failed_builds"]:
        what = f"{at['engine']} {at['version']} for {at['target']}, model {at['model'][:12]}"
        lines += ["", f"failed build, not tried again: {what}, {at['date']}: {at['reason']}", f"  fix: rm {at['file']}   lets it try again"]
    if "bundle" in report:
        at = report["bundle"]
        lines += ["", f"bundle {at['bundle_id']}, {at['precision']}: requested {at['requested']}, {at['runs']} runs it"]
        if at["to_be_built"]:
            lines.append(f"  `kcm edge` builds {', '.join(at['to_be_built'])} beside it and takes it where its decisions agree")
    lines += ["", *(f"problem: {problem}" for problem in report["problems"])] if report["problems"] else []
    return "\n".join(lines)
