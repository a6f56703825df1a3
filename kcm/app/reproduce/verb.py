"""`kcm reproduce`: runs what the tables need, cell by cell, and prints them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.folders import writable
from kcm.app.progress import Steps, left_behind

if TYPE_CHECKING:
    from kcm.app.reproduce.plan import Budget, Part
    from training.simulate import Setting


def reproduce(
    tables: Annotated[
        list[str] | None, typer.Argument(metavar="[TABLE]...", help="language, chat, vision, multimodal, ablation; default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, one round, few samples: minutes, to see that it runs.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=0, help="Instead of the plan's (3; quick: 1).")] = 0,
    cifar: Annotated[
        Path | None, typer.Option("--cifar", help="Folder with CIFAR-100-LT as .npz files; without it the vision table is left out.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of finished cells and of tables.md; a second run goes on there.")] = Path(
        "runs/reproduce"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every cell.")] = False,
) -> None:
    """The paper's tables (arXiv 2510.20278) with this suite: large model alone, +D, +KD, +MCM, +KCM, and the paper's rows beside.

    Data and models differ from the paper's, and each table says how. Every cell (task, method, seed) is kept in --out as soon as it is
    done: cut it at any time, the same command goes on. What isn't there (kcm fetch r52 20newsgroups minilm smollm2 emoji
    efficientnet-lite0) is left out and named.

    Try it: kcm reproduce --quick
    """
    import msgspec

    from kcm.app.reproduce.plan import NAMES, TABLES, absent
    from kcm.app.reproduce.tables import ablation, table
    from kcm.errors import ConfigError

    wanted = tables or list(NAMES)
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ConfigError(f"table {unknown[0]!r} is unknown", fix=f"choose from {', '.join(NAMES)}")
    writable(out)
    out.mkdir(parents=True, exist_ok=True)
    steps, started = Steps(), time.monotonic()
    # The ablation compares two methods over all that the other tables hold.
    chosen = [shown for shown in TABLES if shown.name in wanted or wanted == ["ablation"]]
    missing = {part.name: why for shown in chosen for part in shown.parts if (why := absent(part, cifar))}
    done: dict[str, list[Any]] = {}
    with left_behind(f"finished cells are in {out}; the same command goes on"):
        for part in (part for shown in chosen for part in shown.parts):
            if part.name not in missing:
                budget = part.quick if quick else part.whole
                budget = msgspec.structs.replace(budget, seeds=seeds) if seeds else budget
                done[part.name] = list(_run(part, budget, out, cifar, steps))
    if as_json:
        typer.echo(
            json.dumps({"schema": 1, "cells": {name: msgspec.to_builtins(cells) for name, cells in done.items()}, "absent": missing})
        )
        return
    lines = [f"# The paper's tables, {'quick' if quick else 'whole'}, {time.strftime('%Y-%m-%d')}", ""]
    for shown in chosen:
        if shown.name in wanted:
            lines += table(shown, done, missing)
    if "ablation" in wanted and done:
        lines += ablation(done, chosen)
    lines += ["Accuracy in %, mean ± sd over seeds; differences in points with 95 % intervals, paired over seeds and test samples."]
    lines += ["A seed draws the stream's order, folds, the judge's start, an image net's weights; labels and large model are the same."]
    if quick:
        lines += ["Quick: one seed, one round, few samples. It shows that everything runs, not how well."]
    lines += [f"This run took {time.monotonic() - started:.0f} s; cells from an earlier one cost nothing."]
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    typer.echo("\n".join(lines))


def _run(part: Part, budget: Budget, out: Path, cifar: Path | None, steps: Steps) -> Any:
    from kcm.app.reproduce.cells import cells, identity
    from kcm.assets import task_path

    where = _cifar_task(part, budget, out, cifar) if part.task == "cifar" and cifar else task_path(part.task)
    key = identity(part, budget, where)

    def make() -> Setting:
        from kcm.app.simulate import load_setting

        large = "" if part.task == "cifar" else part.large
        return load_setting(  # type: ignore[no-any-return]
            str(where),
            large=large,
            rounds=budget.rounds,
            share=0.5,
            epsilon=None,
            floor=False,
            scratch=out / f"large-{part.name}-{key}",
            steps=steps,
            at_most=budget.at_most,
        )

    return cells(part, budget, out, key, make, steps)


def _cifar_task(part: Part, budget: Budget, out: Path, cifar: Path) -> Path:
    from kcm.app.reproduce.cifar import write_cifar_task

    return write_cifar_task(
        cifar, out / "tasks" / f"{part.name}{'-quick' if budget.epochs else ''}", large=part.large, epochs=budget.epochs
    )
