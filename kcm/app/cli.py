"""`kcm VERB`: gathers the verbs that the packages announce as entry points, and turns errors into exit codes."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, requires, version
from typing import Any

import typer
from typer.core import TyperGroup

from kcm.errors import KcmError, MissingExtraError

_HELP = """A small model on the device, a large one in the cloud, and a judge between them.

First time: kcm demo. Your own data: kcm init DIR --train FILE.csv, then kcm simulate --task DIR.
Exit codes: 0 well, 1 a bug, 2 wrong usage, 3 configuration, 4 data, 5 bundle, 6 verification, 7 missing extra, 8 unavailable, 9 store,
130 interrupted (Ctrl-C), 141 nobody reads the output any more.
"""


class _Cut(Exception):
    """Carries Ctrl-C or a closed pipe past click, which would end with 1, or without a word."""


@contextmanager
def _past_click() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as cause:
        raise _Cut from cause


class _Verbs(TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _past_click():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _past_click():
            return super().invoke(ctx)


def build(verb: str = "") -> typer.Typer:
    """The application with all verbs, or with the one that will run: the others needn't be imported for it."""
    app = typer.Typer(cls=_Verbs, help=_HELP, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
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
        _run()
    except (_Cut, KeyboardInterrupt, BrokenPipeError) as cut:
        cause = cut.__cause__ if isinstance(cut, _Cut) else cut
        if isinstance(cause, KeyboardInterrupt):
            # What is left, where the verb knows (kcm.app.progress.left_behind).
            line = "; ".join(["interrupted", *map(str, cause.args)])
            typer.echo(f"\n{line}" if sys.stderr.isatty() else line, err=True)
            sys.exit(130)
        assert isinstance(cause, BrokenPipeError)
        if not _unread():
            raise cause from None  # some other pipe: a bug
        sys.exit(141)


def _unread() -> bool:
    """Whether nobody reads stdout or stderr any more. What is still to be flushed there at the end then goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in watch.poll(0)):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


def _run() -> None:
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
