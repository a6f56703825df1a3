"""`kcm VERB`: gathers the verbs that the packages announce as entry points, and turns errors into exit codes."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint, entry_points, requires, version
from typing import Any

import typer

from kcm.errors import KcmError, MissingExtraError

_HELP = """A small model on the device, a large one in the cloud, and a judge between them.

First time: kcm demo. Your own data: kcm init DIR --train FILE.csv, then kcm simulate --task DIR.
Exit codes: 0 well, 1 a bug, 2 wrong usage, 3 configuration, 4 data, 5 bundle, 6 verification, 7 missing extra, 8 unavailable, 9 store.
"""


def build(verb: str = "") -> typer.Typer:
    """The application with all verbs, or with the one that will run: the others needn't be imported for it."""
    app = typer.Typer(help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_root)
    found = sorted(entry_points(group="kcm.verbs"), key=lambda e: e.name)
    for entry in [e for e in found if e.name == verb] or found:
        _add(app, entry)
    return app


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    verb: Any = entry.load()
    if isinstance(verb, typer.Typer):
        app.add_typer(verb, name=entry.name)
    else:
        app.command(name=entry.name)(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("kcm"))
        raise typer.Exit


# A callback of the option: the root itself runs only once a verb is given.
_VERSION = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version)


def _root(show_version: bool = _VERSION) -> None:
    """Nothing of its own."""


# Import names that differ from their distribution's.
_DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
}


def _missing(error: ModuleNotFoundError) -> Exception:
    """The error that names the extra which brings the module; the same error where none does: that is a bug of ours."""
    module = (error.name or "").partition(".")[0]
    distribution = _DISTRIBUTIONS.get(module, module).replace("_", "-")
    needs = [need for need in requires("kcm") or [] if need.replace("_", "-").startswith(distribution) and "extra ==" in need]
    extras = {need.rpartition("extra == ")[2].strip("'\"") for need in needs}
    if not extras:
        return error
    # Several extras bring some modules: the one that trains, else the lightest.
    best = min(extras, key=lambda extra: ("train", "export", "edge", "cpu", extra).index(extra))
    return MissingExtraError(f"{module} is not installed", fix=f"pip install 'kcm[{best}]'")


def main() -> None:
    """Run a verb. A KcmError becomes one message and its own exit code; with --json, a JSON object on stdout."""
    try:
        try:
            build(sys.argv[1] if len(sys.argv) > 1 else "")()
        except ModuleNotFoundError as missing:
            raise _missing(missing) from missing
    except KcmError as error:
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": type(error).__name__, "message": error.message, "fix": error.fix}))
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
