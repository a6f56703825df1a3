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
    epsilon: float = typer.Option(-1.0, "--epsilon", help="ε for kcm_accuracy and cloud_rate instead of the task's."),
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


def load_setting(task_name: str, *, large: str, rounds: int, share: float, epsilon: float, floor: bool, scratch: Path, steps: Steps) -> Any:
    """The simulation's setting: files read, large model fitted and asked about the test split."""
    import msgspec

    from kcm.app.models import LargeInProcess, load_small_kind, one_thread
    from kcm.assets import task_path
    from kcm.task import load_task
    from training.data import load_split
    from training.simulate import Setting

    one_thread()
    task = load_task(task_path(task_name))
    if large:
        kind = "causal" if large == "smollm2" else task.large.kind
        task = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, model=large, kind=kind))
    if epsilon >= 0:
        task = msgspec.structs.replace(task, judge=msgspec.structs.replace(task.judge, epsilon=epsilon))
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
    lines = [
        f"task {summary['task']}, {len(summary['seeds'])} seeds, round {int(mean['round'])}, {mean['escalated_of_stream']:.1%} of the stream escalated, {summary['seconds']:.0f} s",
        f"small {_cell(mean['small_accuracy'], sd['small_accuracy'])}   large {_cell(mean['large_accuracy'], sd['large_accuracy'])}   "
        f"at ε = {mean['epsilon']:.2f}: KCM {_cell(mean['kcm_accuracy'], sd['kcm_accuracy'])} with {mean['cloud_rate']:.1%} calls",
        "",
        "calls, target  realised   KCM            max-softmax    twin judge     floor (TF-IDF)   KCM − max-softmax [95 %]     KCM − floor [95 %]",
    ]
    twin = "mlp" if any(key.startswith("mlp_") for key in next(iter(mean["curve"].values()))) else "kan"
    for rate, at in mean["curve"].items():
        deviation = sd["curve"][rate]
        floor = _cell(mean["floor"]["curve"][rate]["accuracy"], sd["floor"]["curve"][rate]["accuracy"]) if "floor" in mean else "–"
        lines.append(
            f"{float(rate):13.0%}  {at['realised_rate']:8.1%}   {_cell(at['accuracy'], deviation['accuracy'])}   "
            f"{_cell(at['max_softmax_accuracy'], deviation['max_softmax_accuracy'])}   {_cell(at[f'{twin}_accuracy'], deviation[f'{twin}_accuracy'])}   "
            f"{floor:14}   {_interval(summary['paired'].get('kcm_minus_max_softmax', {}).get(rate)):26}   {_interval(summary['paired'].get('kcm_minus_floor', {}).get(rate))}"
        )
    lines.append(
        f"accuracies in %, mean ± sd over seeds; twin judge: {twin} with as many parameters; differences in points, paired over seeds and samples"
    )
    return "\n".join(lines)


def _cell(mean: float, sd: float) -> str:
    return f"{100 * mean:5.2f} ± {100 * sd:4.2f}"


def _interval(difference: dict[str, float] | None) -> str:
    if difference is None:
        return "–"
    return f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
