"""`kcm bench compare`: one measurement of `kcm bench edge` against a later one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kcm.app.bench.figures import FILE, IMAGE_RATIOS, KIND, RATIOS, SCHEMA
from kcm.errors import DataError, VerifyError

_LESS_IS_BETTER = ("rss_mb",)  # beside the ratios: memory hardly hangs on who else is busy


class Spread(msgspec.Struct, frozen=True):
    """Median, and the middle half's ends over repeats."""

    median: float
    low: float
    high: float


class _Bundle(msgspec.Struct, frozen=True):
    bundle_id: str
    task_id: str
    label_space: str


class _Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a file."""

    repeats: int
    ratios: dict[str, Spread]
    spread: dict[str, Spread]
    bundle: _Bundle
    machine: _Machine
    date: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One figure in both files; `verdict` is "worse", "better", or empty where it can't be told from noise."""

    before: Spread
    after: Spread
    verdict: str


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The earlier edge.json, or its folder.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The later one.")],
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="By how much a figure may move: 0.1 is a tenth.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Did it get slower? Exit code 6 where a ratio did: its middle halves don't meet, and it moved by more than the tolerance.

    Files of another machine or another task are shown beside each other with a warning, and not judged. A file of one repeat has no
    middle half: a warning says so.

    Try it: kcm bench compare before/edge.json after/edge.json
    """
    a, b = read(before), read(after)
    found = changes(a, b, tolerance)
    foreign = strangers(a, b)
    single = "; ".join(f"{name} has one repeat: no spread tells noise from change" for name, m in (("A", a), ("B", b)) if m.repeats < 2)
    if single:
        typer.echo(f"warning: {single}\n  fix: kcm bench edge --repeats 15", err=True)
    if foreign:
        typer.echo(f"warning: {foreign}; nothing is judged", err=True)
        found = {name: msgspec.structs.replace(change, verdict="") for name, change in found.items()}
    worse = [name for name, change in found.items() if change.verdict == "worse"]
    if as_json:
        said = {
            "schema": SCHEMA,
            "warning": "; ".join(filter(None, (foreign, single))),
            "tolerance": tolerance,
            "regressions": worse,
            "changes": msgspec.to_builtins(found),
        }
        typer.echo(json.dumps(said))
    else:
        typer.echo(_table(a, b, found))
        if not foreign:
            typer.echo(f"worse: {', '.join(worse)}" if worse else "nothing is worse")
    if worse:
        raise typer.Exit(VerifyError.exit_code)


def read(path: Path) -> Measured:
    """Raises DataError: not a file of `kcm bench edge`, or of another schema."""
    file = path / FILE if path.is_dir() else path
    fix = "kcm bench edge --out DIR   writes DIR/edge.json"
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}", fix=fix) from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}", fix=fix) from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DataError(f"{file} is no result of kcm bench edge", fix=fix)
    if content.get("schema") != SCHEMA:
        raise DataError(f"{file} has schema {content.get('schema')}, this kcm reads {SCHEMA}", fix="measure again with this kcm")
    try:
        return msgspec.convert(content, Measured)
    except msgspec.ValidationError as error:
        raise DataError(f"{file}: {error}", fix="measure again") from error


def strangers(a: Measured, b: Measured) -> str:
    """Why the two can't be held against each other; empty where they can: another bundle of the same task may be what is compared."""
    if a.machine != b.machine:
        return f"other machines: {a.machine.cpu} with {a.machine.cores} cores, {b.machine.cpu} with {b.machine.cores}"
    if (a.bundle.task_id, a.bundle.label_space) != (b.bundle.task_id, b.bundle.label_space):
        return f"bundles of other tasks or labels: {a.bundle.task_id} ({a.bundle.bundle_id}), {b.bundle.task_id} ({b.bundle.bundle_id})"
    return ""


def changes(a: Measured, b: Measured, tolerance: float) -> dict[str, Change]:
    """Every figure that both files have, the ratios first."""
    found: dict[str, Change] = {}
    specs = RATIOS | IMAGE_RATIOS
    for name in [*specs, *a.spread]:
        before, after = (m.ratios.get(name) or m.spread.get(name) for m in (a, b))
        if before is None or after is None:
            continue
        judged = name in specs or name in _LESS_IS_BETTER
        up = name in specs and specs[name].at_least
        found[name] = Change(before=before, after=after, verdict=_verdict(before, after, tolerance, more_is_better=up) if judged else "")
    return found


def _verdict(before: Spread, after: Spread, tolerance: float, *, more_is_better: bool) -> str:
    if after.low > before.high and after.median > before.median * (1 + tolerance):
        return "better" if more_is_better else "worse"
    if after.high < before.low and after.median * (1 + tolerance) < before.median:
        return "worse" if more_is_better else "better"
    return ""


def _table(a: Measured, b: Measured, found: dict[str, Change]) -> str:
    lines = [f"A: {a.date}, bundle {a.bundle.bundle_id}; B: {b.date}, bundle {b.bundle.bundle_id}; medians, the middle half in brackets"]
    lines.append(f"{'':40} {'A':28} {'B':28} B ÷ A")
    for name, change in found.items():
        sides = (f"{at.median:9.3f} [{at.low:.3f}, {at.high:.3f}]" for at in (change.before, change.after))
        moved = change.after.median / change.before.median if change.before.median else float("nan")
        lines.append(f"{name:40} {' '.join(f'{side:28}' for side in sides)} {moved:5.2f}  {change.verdict}".rstrip())
    return "\n".join(lines)
