"""`kcm edge` runs the daemon; `kcm bundle` installs, rolls back and inspects what it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edge_runtime.config import EdgeConfig

_BUNDLE_HELP = """Install, roll back and inspect the bundles of this device.

A running `kcm edge --store ROOT` follows within a second, without a failed request.

\b
kcm bundle install bundles/r52 --store /var/lib/kcm      verify, try, copy, serve
kcm bundle rollback --store /var/lib/kcm                 back to the one before
"""
bundle = typer.Typer(
    help=_BUNDLE_HELP,
    no_args_is_help=True,
)
Store = Annotated[Path, typer.Option("--store", metavar="ROOT", help="The device's bundle store: the same ROOT as `kcm edge --store`.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A bundle folder, as `kcm export` writes it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def edge(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with an [edge] table.")] = None,
    bundle: Annotated[str | None, typer.Option(metavar="DIR", help="Serve this one bundle folder.")] = None,
    store: Annotated[str | None, typer.Option(metavar="ROOT", help="Serve the current bundle of a store; swaps under traffic.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="In order of preference, with commas: auto, tensorrt, tensorrt-rtx, onnx-cuda, onnx-tensorrt, onnx-cpu. "
            "What can't run here is skipped; kcm doctor says why.",
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="fp32, fp16 or int8, where the bundle has it.")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDR", help="HOST:PORT (port 0: a free one) or unix:/path. Beyond loopback: needs [edge.tls].")
    ] = None,
    cloud: Annotated[str | None, typer.Option(metavar="ADDR", help="Where uncertain samples go. Without: answered DEGRADED.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Longest wait for the cloud, per request.")] = None,
    explore: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of what stays here, sent to the cloud later as well: 0 to 1, by default 0.01.")
    ] = None,
    state: Annotated[str | None, typer.Option(metavar="DIR", help="Spool and identity; one daemon per folder.")] = None,
    edge_id: Annotated[str | None, typer.Option(help="This device's name at the cloud. With TLS: its certificate's DNS SAN.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="ADDR", help="Serve Prometheus /metrics on this loopback address.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check settings and bundle, print what would be served, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Answer samples on this device; ask the cloud where the judge is unsure.

    Prints `ready on ADDRESS` once requests are answered. SIGTERM ends it after the calls in flight; SIGHUP looks for a new bundle.
    Settings: flag > KCM_EDGE__* > --config FILE > default, e.g. KCM_EDGE__CLOUD__DEADLINE_MS=400.

    \b
    kcm edge --bundle bundles/r52                                    alone
    kcm edge --store /var/lib/kcm --cloud 127.0.0.1:50071            with a cloud, swapping bundles
    """
    import asyncio

    from kcm.logs import configure_logging, quiet_grpc

    quiet_grpc()
    from edge_runtime.config import EdgeConfig, check
    from kcm.config import load

    flags: dict[str, Any] = {
        "bundle": bundle,
        "store": store,
        "engine": engine,
        "precision": precision,
        "listen": listen,
        "cloud.target": cloud,
        "cloud.deadline_ms": deadline_ms,
        "explore": explore,
        "state_dir": state,
        "edge_id": edge_id,
        "metrics_listen": metrics,
    }
    settings, _ = load(EdgeConfig, "edge", file=config, flags=flags)
    check(settings)
    if dry_run:
        _dry_run(settings, as_json)
        return
    configure_logging()
    from edge_runtime.daemon import serve

    def ready(address: str, metrics_address: str) -> None:
        typer.echo(json.dumps({"ready": address, "metrics": metrics_address}) if as_json else f"ready on {address}")

    asyncio.run(serve(settings, ready))


def _dry_run(settings: EdgeConfig, as_json: bool) -> None:
    from edge_runtime.stats import Stats
    from edge_runtime.updater import Updater

    updater = Updater(settings, Stats())
    runtime = updater.first()
    shown = {
        "listen": settings.listen,
        "bundle_id": runtime.bundle_id,
        "task_id": runtime.manifest.task_id,
        "epsilon": runtime.epsilon,
        "precision": runtime.precision,
        "engine": runtime.provider,
        "better": [backend.name for backend in updater.loader.better(runtime)],
        "skipped": {skip.name: skip.reason for skip in updater.loader.skipped},
        "cloud": settings.cloud.target,
        "state": str(settings.state_path),
    }
    _show(shown, as_json)


@bundle.command()
def install(
    folder: Folder,
    store: Store,
    precision: Annotated[str, typer.Option("--precision", help="What is tried: the one that `kcm edge` serves.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Also take one of another task or labels, or one that was rolled back.")] = False,
    as_json: Json = False,
) -> None:
    """Take a bundle in and serve it.

    It is verified, tried on this device, copied into the store and made current.

    Every hash is checked and the golden inputs must give the golden outputs here. A bundle that fails changes nothing.
    """
    from edge_runtime.bundles import BundleStore
    from kcm.bundle import as_precision

    state = BundleStore(store).install(folder, force=force, precision=as_precision(precision))
    _show({"current": state.current, "previous": state.previous}, as_json)


@bundle.command()
def rollback(
    store: Store,
    reason: Annotated[str, typer.Option(help="Kept with the blocked bundle.")] = "rolled back by hand",
    as_json: Json = False,
) -> None:
    """Back to the previous bundle; the bad one is blocked."""
    from edge_runtime.bundles import BundleStore

    state = BundleStore(store).rollback(reason)
    _show({"current": state.current, "blocked": state.previous}, as_json)


@bundle.command()
def show(store: Store, as_json: Json = False) -> None:
    """What serves, what is installed, what is blocked.

    The current bundle is loaded as `kcm edge` would: `problem` says why it can't be.
    """
    import msgspec

    from edge_runtime.bundles import BundleStore

    root = BundleStore(store)
    state = root.existing()
    _show({**msgspec.to_builtins(state), "problem": root.problem(state)}, as_json)


@bundle.command("verify-files")
def verify_files(folder: Folder, as_json: Json = False) -> None:
    """Check a bundle's files against its manifest.

    Nothing is run. Exit code 5 where a file is damaged, missing, foreign or a link.
    """
    from kcm.bundle import load_bundle

    manifest = load_bundle(folder).manifest
    size = sum(entry.size for entry in manifest.files.values())
    _show({"bundle_id": manifest.bundle_id, "task_id": manifest.task_id, "files": len(manifest.files), "bytes": size}, as_json)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} ({why})" for key, why in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        typer.echo(f"{name.replace('_', ' '):<14} {value}")
