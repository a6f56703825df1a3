"""`kcm simulate`: the whole loop offline, with its baselines in the same run."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

from kcm.app.progress import Steps


def simulate(
    task: str = typer.Option(..., "--task", help="A task.toml or its folder, or a fetched task's name."),
    seeds: int = typer.Option(5, "--seeds", min=1, help="How many seeds; each draws the stream's order, the folds and the judge's start."),
    rounds: int = typer.Option(5, "--rounds", min=0, help="Distillation rounds after round 0."),
    large: str = typer.Option("", "--large", help="Large model instead of the task's: minilm, smollm2, or a folder."),
    share: float = typer.Option(0.5, "--share", min=0.0, max=1.0, help="Share of the stream that may go to the large model for learning."),
    epsilon: float | None = typer.Option(
        None, "--epsilon", min=0.0, max=1.0, help="ε for kcm_accuracy and cloud_rate instead of the task's."
    ),
    floor: bool = typer.Option(True, "--floor/--no-floor", help="Run the TF-IDF + linear + max-softmax baseline beside."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
    out: Path = typer.Option(None, "--out", help="Also write the JSON to this file."),
) -> None:
    """Rounds 0..N of the closed loop on a task with train, large_train, stream and test files, no server involved.

    Per round: accuracy of the small and the large model, of KCM at ε, and the curve of accuracy against cloud calls. ε for each
    target comes from a tenth of the stream that is never distilled; labels of the stream are never read.
    """
    from training.simulate import SeedResult, simulate_seed, summarise

    steps = Steps()
    started = time.monotonic()
    results: list[SeedResult] = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = load_setting(
            task, large=large, rounds=rounds, share=share, epsilon=epsilon, floor=floor, scratch=Path(scratch), steps=steps
        )
        for seed in range(seeds):
            results.append(simulate_seed(setting, seed, lambda text, seed=seed: steps(f"seed {seed}: {text}")))  # type: ignore[misc]
    summary: dict[str, Any] = {**summarise(results), "task": setting.task.id, "seconds": round(time.monotonic() - started, 1)}
    text = json.dumps(summary)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    typer.echo(text if as_json else table(summary))


def load_setting(
    task_name: str, *, large: str, rounds: int, share: float, epsilon: float | None, floor: bool, scratch: Path, steps: Steps
) -> Any:
    """The simulation's setting: files read, large model fitted and asked about the test split."""
    import msgspec

    from kcm.app.models import LargeInProcess, load_small_kind, one_thread
    from kcm.assets import model_path, task_path
    from kcm.task import load_task
    from training.data import load_split
    from training.simulate import Setting

    one_thread()
    task = load_task(task_path(task_name))
    if large:
        kind = "causal" if large == "smollm2" else task.large.kind
        task = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, model=large, kind=kind))
    if epsilon is not None:
        task = msgspec.structs.replace(task, judge=msgspec.structs.replace(task.judge, epsilon=epsilon))
    model_path(task.large.model, task.root)  # fails now, not after the data is read
    train, stream, test = (load_split(task, name) for name in ("train", "stream", "test"))
    teach = load_split(task, "large_train") if task.data.large_train else train
    steps(
        f"task {task.id}: {len(task.labels)} labels, train {len(train)}, large_train {len(teach)}, stream {len(stream)}, test {len(test)}"
    )
    kind_of_small = load_small_kind(task, steps)
    steps(f"large model {task.large.model}: fit")
    teacher = LargeInProcess(task, scratch / "large", teach, steps)
    return Setting(
        task=task,
        kind=kind_of_small,
        train=train,
        stream=stream,
        test=test,
        teacher=teacher.logits,
        large_test=teacher.logits(test.texts),
        rounds=rounds,
        share=share,
        floor=floor,
    )


def table(summary: dict[str, Any]) -> str:
    """The last round over seeds, mean ± sd in percent, with the paired differences."""
    mean, sd = summary["mean"], summary["sd"]
    twin = "mlp" if "mlp_accuracy" in mean["curve"]["0.0"] else "kan"
    title = f"task {summary['task']}, {len(summary['seeds'])} seeds, round {int(mean['round'])}"
    at_epsilon = f"KCM {_cell(mean['kcm_accuracy'], sd['kcm_accuracy'])} with {mean['cloud_rate']:.1%} calls"
    lines = [
        f"{title}, {mean['escalated_of_stream']:.1%} of the stream escalated, {summary['seconds']:.0f} s",
        f"small {_cell(mean['small_accuracy'], sd['small_accuracy'])}   large {_cell(mean['large_accuracy'], sd['large_accuracy'])}   "
        f"at ε = {mean['epsilon']:.2f}: {at_epsilon}",
        "",
        f"{'target':>6} {'calls':>6}  {'KCM':14} {'max-softmax':14} {'twin judge':14} {'floor':14} {'KCM − max-softmax':24} KCM − floor",
    ]
    for rate, at in mean["curve"].items():
        spread = sd["curve"][rate]
        cells = [_cell(at[f"{name}accuracy"], spread[f"{name}accuracy"]) for name in ("", "max_softmax_", f"{twin}_")]
        cells.append(_cell(mean["floor"]["curve"][rate]["accuracy"], sd["floor"]["curve"][rate]["accuracy"]) if "floor" in mean else "–")
        paired = [_interval(summary["paired"].get(f"kcm_minus_{name}", {}).get(rate)) for name in ("max_softmax", "floor")]
        columns = " ".join(f"{cell:14}" for cell in cells)
        lines.append(f"{float(rate):6.0%} {at['realised_rate']:6.1%}  {columns} {paired[0]:24} {paired[1]}")
    lines += [
        "accuracy in %, mean ± sd over seeds; differences in points with 95 % intervals, paired over seeds and samples",
        f"twin judge: {twin} with as many parameters; floor: TF-IDF + linear + max-softmax, same protocol; calls: KCM's, on the test split",
    ]
    return "\n".join(lines)


def _cell(mean: float, sd: float) -> str:
    return f"{100 * mean:5.2f} ± {100 * sd:4.2f}"


def _interval(difference: dict[str, float] | None) -> str:
    if difference is None:
        return "–"
    return f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
