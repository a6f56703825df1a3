"""Verbs `kcm cloud` and `kcm store`. Heavy imports happen inside, since `kcm --help` imports this module."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cloud_server.compact import Report, Stats
    from cloud_server.estimates import Estimate, Share
    from cloud_server.hint_effect import HintEffect

store = typer.Typer(help="The teacher store: what the cloud answered, kept for distillation.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StoreFolder = Annotated[Path, typer.Argument(help="The folder that `kcm cloud --store` writes.", show_default=False)]


def cloud(
    config: Annotated[Path | None, typer.Option(help="TOML file with a [cloud] table. Flags and KCM_CLOUD__… go before it.")] = None,
    task: Annotated[str | None, typer.Option(help="task.toml, its folder, or a fetched task's name.")] = None,
    large: Annotated[Path | None, typer.Option(help="Folder of the large model (large.json), as `kcm train-large` writes it.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the teacher store; made if it isn't there.")] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT or unix:PATH. Beyond loopback only with [cloud.tls]. Port 0: a free one.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT for Prometheus /metrics, on loopback.")] = None,
    replica: Annotated[str | None, typer.Option(help="This process's name in the store; one inbox per replica.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Samples per run of the model at most.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings and say where each came from; start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the large model over gRPC and keep what it answered.

    Prints `ready on ADDRESS` once the model has answered a warm-up, then serves until SIGTERM, which drains.

    Try it: kcm cloud --task r52 --large ./large --store ./store
    """
    from kcm.config import load
    from kcm.logs import quiet_grpc

    quiet_grpc()
    flags = {
        "task": task,
        "large": None if large is None else str(large),
        "store": None if store is None else str(store),
        "listen": listen,
        "metrics_listen": metrics,
        "replica": replica,
        "max_batch": max_batch,
        "threads": threads,
    }
    from cloud_server.config import CloudConfig

    settings, origin = load(CloudConfig, "cloud", file=config, flags=flags)
    if dry_run:
        _show_settings(settings, origin, as_json)
        return
    _serve(settings, as_json)


def _show_settings(settings: Any, origin: dict[str, str], as_json: bool) -> None:
    import msgspec

    from cloud_server.server import check

    check(settings)
    values = msgspec.to_builtins(settings)
    if as_json:
        typer.echo(json.dumps({"settings": values, "origin": origin}))
        return
    for key, value in values.items():
        where = origin.get(key) or next((f"{name}: {source}" for name, source in origin.items() if name.startswith(key + ".")), "default")
        typer.echo(f"{key} = {value!r}   # {where}")


def _serve(settings: Any, as_json: bool) -> None:
    import asyncio

    from kcm.errors import require
    from kcm.logs import configure_logging

    for module in ("grpc", "apsw", "prometheus_client"):
        require(module, "cloud")
    from cloud_server.server import check, load_model, serve

    configure_logging()
    task = check(settings)
    model = load_model(settings)

    def ready(address: str, metrics_address: str) -> None:
        typer.echo(json.dumps({"ready": address, "metrics": metrics_address}) if as_json else f"ready on {address}")
        sys.stdout.flush()

    asyncio.run(serve(settings, task, model, ready))


@store.command("stats")
def stats(folder: StoreFolder, as_json: AsJson = False) -> None:
    """Count rows: compacted, waiting in inboxes, and those that still lack the teacher's own logits."""
    from cloud_server.compact import read_stats

    found: Stats = read_stats(folder)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(found).decode())
        return
    typer.echo(f"{found.compacted} rows in {found.parts} Parquet parts ({found.bytes / 2**20:.1f} MiB), {found.labelled} with a truth")
    for inbox in found.inboxes:
        typer.echo(f"{inbox.name}: {inbox.waiting} wait, {inbox.unfilled} of them without teacher logits")
        typer.echo(f"{inbox.name}: {inbox.compacted} compacted, kept for resends; {inbox.labels} truths wait")


@store.command("compact")
def compact(
    folder: StoreFolder,
    force: Annotated[
        bool, typer.Option("--force", help="Take rows along whose teacher logits are not filled yet; they stay empty.")
    ] = False,
    retain_days: Annotated[float, typer.Option(min=0.0, help="Keep compacted rows' answers in the inbox this long, for resends.")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Move answered samples from the inboxes into Parquet, each exactly once and with its truth; `kcm distill` reads that.

    Safe while `kcm cloud` serves, and safe to kill: run it again.

    Try it: kcm store compact ./store
    """
    from cloud_server.compact import compact as run

    done: Report = run(folder, force=force, retain_days=retain_days, dry_run=dry_run)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(done).decode())
        return
    typer.echo(f"{'would write' if dry_run else 'wrote'} {done.written} rows in {done.parts} parts; {done.repeated} were there already")
    typer.echo(f"{done.unfilled} wait for teacher logits; {done.purged} old rows purged from inboxes")
    typer.echo(f"{done.labelled} truths {'would go' if dry_run else 'went'} into rows; {done.unmatched} wait for theirs")
    if done.dropped:
        typer.echo(f"{done.dropped} truths dropped: their samples never came in a month")


@store.command("hints")
def hints(folder: StoreFolder, as_json: AsJson = False) -> None:
    """Say whether the hint helps the large model: its effect on compacted rows, and what the hint gate should be.

    Needs no truth to say how often the hint changes an answer; with truths (`Feedback`), whether it helps.

    Try it: kcm store compact ./store && kcm store hints ./store
    """
    from cloud_server.hint_effect import hint_effects

    found = hint_effects(folder)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode({"effects": found}).decode())
        return
    for effect in found:
        _show_effect(effect)


def _show_effect(found: HintEffect) -> None:
    typer.echo(f"{found.teacher_id} under prompt {found.prompt_id}: {found.rows} escalated rows, {found.labelled} with a truth")
    typer.echo(f"  {found.verdict}")
    for pairs in found.pairs:
        changed, moved = pairs.changed, pairs.to_small
        typer.echo(
            f"  {pairs.arm}, answered with it and without: changed {_percent(changed)} of {pairs.samples} answers,"
            f" {_percent(moved)} to the small model's"
        )
        typer.echo(f"    agrees with the small model: {pairs.agree_with.share:.1%} with the hint, {pairs.agree_without.share:.1%} without")
        _show_splits(pairs.effect, pairs.small_right, pairs.small_wrong)
    chance = found.randomised
    typer.echo(f"  by chance shown {chance.shown} times, withheld {chance.withheld} times")
    _show_splits(chance.effect, chance.small_right, chance.small_wrong)


def _show_splits(*estimates: Estimate) -> None:
    for name, estimate in zip(("accuracy", "  small model right", "  small model wrong"), estimates, strict=True):
        if estimate.samples:
            typer.echo(f"    {name}: {estimate.in_points()} on {estimate.samples} labelled samples")


def _percent(found: Share) -> str:
    return f"{found.share:.1%} [{found.low:.1%}, {found.high:.1%}]"
