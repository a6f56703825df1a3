"""The verb `kcm bench` and its three commands."""

from __future__ import annotations

import typer

from kcm.app.bench.compare import compare
from kcm.app.bench.edge import edge
from kcm.app.bench.route import route

bench = typer.Typer(help="Measure routing on your own recordings, and the edge on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure routing on your own recordings, and the edge on this machine."""


bench.command()(route)
bench.command()(edge)
bench.command()(compare)
