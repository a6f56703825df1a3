"""`kcm simulate`: the whole loop offline, with its baselines in the same run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kcm.app.folders import claim_file
from kcm.app.progress import Steps, left_behind

if TYPE_CHECKING:
    from training.data import Split


def simulate(
    task: str = typer.Option(..., "--task", help="A task.toml or its folder, or a fetched task's name."),
    seeds: int = typer.Option(5, "--seeds", min=1, help="How many seeds; each draws the stream's order, the folds and the judge's start."),
    rounds: int = typer.Option(5, "--rounds", min=0, help="Distillation rounds after round 0."),
    large: str = typer.Option("", "--large", help="Instead of the task's: minilm, smollm2, a folder of train-large, or of an encoder."),
    share: float = typer.Option(0.5, "--share", min=0.0, max=1.0, help="Share of the stream that may go to the large model for learning."),
    epsilon: float | None = typer.Option(
        None, "--epsilon", min=0.0, max=1.0, help="ε for kcm_accuracy and cloud_rate instead of the task's."
    ),
    methods: str = typer.Option("", "--methods", help="Distil by each of these on the same seeds, as d,kd,mcm,kcm; else by the task's."),
    floor: bool = typer.Option(True, "--floor/--no-floor", help="Run the TF-IDF + linear + max-softmax baseline beside; images have none."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON on stdout."),
    out: Path = typer.Option(None, "--out", help="Also write the JSON to this file; a result of an earlier time is replaced."),
) -> None:
    """Rounds 0..N of the closed loop on a task with train, large_train, stream and test files, no server involved.

    Per round: accuracy of the small and the large model, of KCM at ε, and the curve of accuracy against cloud calls. ε for each
    target comes from a tenth of the stream that is never distilled; labels of the stream are never read. With --methods the paper's
    rows stand side by side: D, KD (samples drawn at random, the same budget), MCM and KCM.
    """
    from kcm.task import with_method
    from training.simulate import SeedResult, compare_methods, simulate_seed, summarise

    if out is not None:
        claim_file(out)
    steps = Steps()
    started = time.monotonic()
    asked = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip())) or [""]
    results: dict[str, list[SeedResult]] = {name: [] for name in asked}
    with left_behind("no result was written"), tempfile.TemporaryDirectory() as scratch:
        setting = load_setting(
            task, large=large, rounds=rounds, share=share, epsilon=epsilon, floor=floor, scratch=Path(scratch), steps=steps
        )
        for name in filter(None, asked):
            with_method(setting.task, name)  # an unknown one fails now
        for seed in range(seeds):
            for name in asked:
                where = f"seed {seed}, {name}: " if name else f"seed {seed}: "
                results[name].append(simulate_seed(setting, seed, lambda text, where=where: steps(where + text), name))  # type: ignore[misc]
    summary: dict[str, Any] = {
        "schema": 1,
        "task": setting.task.id,
        "modality": setting.task.modality,
        "seconds": round(time.monotonic() - started, 1),
    }
    if len(asked) == 1:
        summary = {**summarise(results[asked[0]]), **summary, "method": asked[0] or setting.task.distill.method}
    else:
        summary |= {"methods": {name: summarise(of_name) for name, of_name in results.items()}, "paired": compare_methods(results)}
    text = json.dumps(summary)
    if out:
        out.write_text(text)
    typer.echo(text if as_json else method_table(summary) if "methods" in summary else table(summary))


def load_setting(
    task_name: str,
    *,
    large: str,
    rounds: int,
    share: float,
    epsilon: float | None,
    floor: bool,
    scratch: Path,
    steps: Steps,
    at_most: Mapping[str, int] | None = None,
) -> Any:
    """The simulation's setting: files read, large model fitted and asked about the test split.

    How frequent a class is, its rows in large_train say: an edge's few labels are often drawn evenly.

    Args:
        at_most: of a file of the task at most so many samples, drawn evenly.
    """
    import msgspec
    import numpy as np

    from cloud_server.models import LARGE_FILE
    from kcm.app.models import LargeInProcess, load_small_kind, one_thread
    from kcm.assets import model_path, task_path
    from kcm.errors import ConfigError
    from kcm.task import load_task
    from training.calibrate import distinct
    from training.data import load_split
    from training.simulate import Setting

    one_thread()
    task = load_task(task_path(task_name))
    fitted = Path(large) if large and (Path(large) / LARGE_FILE).is_file() else None
    if large and fitted is None and (task.modality == "image" or task.gallery.file):
        fix = "kcm train-large --task TASK --out FOLDER, or kind under [large] of task.toml"
        raise ConfigError(f"--large {large} holds no large model of images", fix=fix)
    if large and fitted is None:
        kind = "causal" if large == "smollm2" else task.large.kind
        task = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, model=large, kind=kind))
    if epsilon is not None:
        task = msgspec.structs.replace(task, judge=msgspec.structs.replace(task.judge, epsilon=epsilon))
    if fitted:
        pass  # nothing is to be fetched
    elif task.gallery.file:
        if task.large.kind == "dual":
            model_path(task.large.net.weights, task.root)
        model_path(task.large.model, task.root)
    elif task.modality == "text":
        model_path(task.large.model, task.root)  # fails now, not after the data is read
    else:
        from training.vision.large import check_large

        check_large(task)

    def read(name: str) -> Split:
        return _some(load_split(task, name), (at_most or {}).get(name, 0))

    train, stream, test = map(read, ("train", "stream", "test"))
    teach = read("large_train") if task.data.large_train and not task.gallery.file else train
    steps(
        f"task {task.id}: {len(task.labels)} labels, train {len(train)}, large_train {len(teach)}, stream {len(stream)}, test {len(test)}"
    )
    # No ε is chosen by labels here, so all that were kept back may choose the head.
    name = "selection" if task.data.selection else "calibration"
    selection = distinct(read(name)) if getattr(task.data, name) else None
    kind_of_small = load_small_kind(task, steps)
    if fitted:
        teacher = LargeInProcess.of(task, fitted, steps)
    else:
        steps(f"large model {task.large.model if task.large.kind in ('encoder', 'causal') else task.large.kind}: fit")
        teacher = LargeInProcess(task, scratch / "large", teach, steps, hints=task.modality == "text" and not task.gallery.file)
    return Setting(
        task=task,
        kind=kind_of_small,
        train=train,
        stream=stream,
        test=test,
        teacher=teacher.logits,
        large_test=teacher.logits(test.payloads),
        rounds=rounds,
        share=share,
        floor=floor and task.modality == "text" and not task.gallery.file,
        frequency=np.bincount(teach.y, minlength=len(task.labels)),
        selection=selection,
    )


def _some(split: Split, most: int) -> Split:
    """At most so many rows, always the same ones; 0 for all."""
    import numpy as np

    if not most or len(split) <= most:
        return split
    return split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:most]))


def method_table(summary: dict[str, Any]) -> str:
    """The paper's rows: the last round of each method over seeds, mean ± sd in percent, and what the best one has over each."""
    some = next(iter(summary["methods"].values()))
    title = f"task {summary['task']}, {len(some['seeds'])} seeds, round {int(some['mean']['round'])}, {summary['seconds']:.0f} s"
    rates = [rate for rate in some["mean"]["curve"] if 0 < float(rate) < 1]
    groups = list(some["mean"]["groups"]["small"])
    head = "".join(f" {'at ' + format(float(rate), '.0%'):13}" for rate in rates)
    lines = [title, "", f"{'':8} {'asked':>6}  {'small alone':13}{head} {' / '.join(groups)} of small; calls"]
    start = [seed["rounds"][0]["small_accuracy"] for seed in some["seeds"]]
    lines.append(f"{'round 0':8} {'':>6}  {100 * sum(start) / len(start):5.2f}")
    for name, of_name in summary["methods"].items():
        mean, sd = of_name["mean"], of_name["sd"]
        cells = [_cell(mean["small_accuracy"], sd["small_accuracy"])]
        cells += [_cell(mean["curve"][rate]["accuracy"], sd["curve"][rate]["accuracy"]) for rate in rates]
        tail = " / ".join(f"{100 * mean['groups']['small'][group]:.1f}" for group in groups)
        tail += "; " + " ".join(f"{mean['curve'][rate]['realised_rate']:.1%}" for rate in rates)
        lines.append(f"{'+ ' + name.upper():8} {mean['escalated_of_stream']:6.1%}  {' '.join(f'{cell:13}' for cell in cells)} {tail}")
    large = some["mean"]
    lines.append(f"{'large':8} {'':>6}  {100 * large['large_accuracy']:5.2f}")
    lines.append("")
    for name, at in summary["paired"].items():
        cells = [f"{'small' if float(rate) == 0 else format(float(rate), '.0%')} {_interval(at[rate])}" for rate in at]
        lines.append(f"{name.replace('_minus_', ' − ').upper()}: " + "   ".join(cells))
    lines.append("accuracy in %, mean ± sd over seeds; differences in points with 95 % intervals, paired over seeds and samples")
    lines += ["asked: share of the stream that taught; calls: what each target came to on the test split", *_coarse(large)]
    return "\n".join(lines)


def _coarse(mean: dict[str, Any]) -> list[str]:
    """A word of warning where few samples say what a share of calls is."""
    reserve = int(mean["reserve"])
    if reserve >= _ENOUGH:
        return []
    spread = 196 * (0.3 * 0.7 / reserve) ** 0.5
    return [
        f"warning: each target's ε stands on {reserve} reserved samples of the stream: its share of calls may be off by {spread:.0f} points"
    ]


def table(summary: dict[str, Any]) -> str:
    """The last round over seeds, mean ± sd in percent, with the paired differences."""
    mean, sd = summary["mean"], summary["sd"]
    twin = "mlp" if "mlp_accuracy" in mean["curve"]["0.0"] else "kan"
    title = f"task {summary['task']}, {len(summary['seeds'])} seeds, round {int(mean['round'])}"
    at_epsilon = f"{_cell(mean['kcm_accuracy'], sd['kcm_accuracy'])} with {mean['cloud_rate']:.1%} calls"
    columns = {"KCM": "", "max-softmax": "max_softmax_", "C_x": "confidence_", f"{twin} twin": f"{twin}_"}
    lines = [
        f"{title}, {mean['escalated_of_stream']:.1%} of the stream escalated, {summary['seconds']:.0f} s",
        f"small {_cell(mean['small_accuracy'], sd['small_accuracy'])}   large {_cell(mean['large_accuracy'], sd['large_accuracy'])}   "
        f"C_x > {mean['epsilon']:.2f}: {at_epsilon}   head: {mean['head']}",
        "",
        f"{'target':>6} {'calls':>6}  {' '.join(f'{name:14}' for name in columns)}" + (" floor" if "floor" in mean else ""),
    ]
    for rate, at in mean["curve"].items():
        spread = sd["curve"][rate]
        cells = [_cell(at[f"{prefix}accuracy"], spread[f"{prefix}accuracy"]) for prefix in columns.values()]
        if "floor" in mean:
            cells.append(_cell(mean["floor"]["curve"][rate]["accuracy"], sd["floor"]["curve"][rate]["accuracy"]))
        lines.append(f"{float(rate):6.0%} {at['realised_rate']:6.1%}  " + " ".join(f"{cell:14}" for cell in cells))
    titles = [_title(name) for name in summary["paired"]]
    lines += ["", f"{'':6} {'':6}  " + " ".join(f"{title:24}" for title in titles)]
    for rate in mean["curve"]:
        cells = [_interval(at.get(rate)) for at in summary["paired"].values()]
        if any(cell != "–" for cell in cells):
            lines.append(f"{float(rate):6.0%} {'':6}  " + " ".join(f"{cell:24}" for cell in cells))
    groups = {name: " / ".join(f"{100 * value:.1f}" for value in at.values()) for name, at in mean["groups"].items()}
    lines += ["", f"{' / '.join(mean['groups']['small'])} frequent classes: " + ", ".join(f"{name} {at}" for name, at in groups.items())]
    if "outside_auroc" in mean:
        lines.append(
            "AUROC against samples of no class: " + ", ".join(f"{_NAMES.get(k, k)} {v:.3f}" for k, v in mean["outside_auroc"].items())
        )
    if "recall" in mean:
        lines += ["", *_recall(mean["recall"], sd["recall"], mean["grouped_at"], twin)]
    lines += [
        "accuracy in %, mean ± sd over seeds; differences in points with 95 % intervals, paired over seeds and samples",
        f"twin: the same head on {'an MLP' if twin == 'mlp' else 'a KAN'} with as many parameters; "
        + ("floor: TF-IDF + linear + max-softmax" if "floor" in mean else f"{_without_floor(summary)} no TF-IDF floor"),
        f"calls: KCM's, on the test split; groups at {mean['grouped_at']:.0%} calls",
        *_coarse(mean),
    ]
    return "\n".join(lines)


def _without_floor(summary: dict[str, Any]) -> str:
    return "images have" if summary.get("modality") == "image" else "a gallery has" if "recall" in summary["mean"] else "here is"


def _recall(mean: dict[str, dict[str, float]], sd: dict[str, dict[str, float]], rate: float, twin: str) -> list[str]:
    """Of a retrieval task: R@k by system, each query with the whole list of the model that answered it."""
    places = list(next(iter(mean.values())))
    lines = [f"{f'recall, routed at {rate:.0%} calls':28}" + "".join(f" {'R@' + k:14}" for k in places)]
    for name, at in mean.items():
        shown = f"{twin} twin" if name == "twin" else _NAMES.get(name, name)
        lines.append(f"{shown:28}" + "".join(f" {_cell(at[k], sd[name][k]):14}" for k in places))
    return lines


_ENOUGH = 200  # reserved samples: a share of 30 % then is uncertain by 6 points


def _title(pair: str) -> str:
    one, other = pair.split("_minus_")
    return f"{_NAMES.get(one, one)} − {_NAMES.get(other, other)}" + (" as C_x" if one != "kcm" else "")


_NAMES = {"kan": "KAN", "mlp": "MLP", "kcm": "KCM", "max_softmax": "max-softmax", "confidence": "C_x", "largest_logit": "largest logit"}


def _cell(mean: float, sd: float) -> str:
    return f"{100 * mean:5.2f} ± {100 * sd:4.2f}"


def _interval(difference: dict[str, float] | None) -> str:
    if difference is None:
        return "–"
    return f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
