"""The closed loop on CIFAR-100-LT (imbalance 100): an edge with a fifth of the long tail's labels, a large model with all of them.

    python -m benchmarks.cifar100_lt --data FOLDER [--seeds 3] [--rounds 2] [--epochs 40] [--methods kcm,mcm] [--large bbn] [--quick]

FOLDER holds cifar100_lt_if100_dev.npz (x_train, y_train, x_dev, y_dev, classes) and cifar100_stream_unlabelled.npz (x). The stream's
labels are withheld, and it has few images of the frequent classes. Of the 5,000 balanced dev images 1,000 choose the head that routes,
4,000 are the test. Groups are those of the literature, by rows in the long-tailed set: more than 100, 20 to 100, fewer (Liu et al.
2019). Each seed draws the edge's labels, the small nets' first weights, the order of the stream, folds and the judge's start.
The large model is the same for all seeds; --keep FOLDER keeps it and its answers between runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.app.models import LargeInProcess, one_thread
from kcm.app.progress import Steps
from kcm.images import png
from kcm.task import DistillSpec, JudgeSpec, LargeSpec, NetSpec, PreprocessSpec, SmallSpec, Task
from training.data import Split
from training.evaluate import paired_interval
from training.simulate import SeedResult, Setting, compare_methods, simulate_seed, summarise
from training.vision import load_vision

FIFTH, SELECTION = 0.2, 1000
MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)  # of CIFAR-100's training pixels
RATES = ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "1.0")
AT = 0.3
LARGE = {
    "efficientnet-lite": LargeSpec(kind="efficientnet-lite", size=128, net=NetSpec(frozen=True)),
    "resnet": LargeSpec(kind="resnet", net=NetSpec(depth=32, epochs=60, learning_rate=0.2)),
    "bbn": LargeSpec(kind="bbn", net=NetSpec(depth=32, epochs=60, learning_rate=0.2)),
}
Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]


class Data:
    """The files as splits; `groups` [C] per name by the rows of each class in the long-tailed set."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        with np.load(folder / "cifar100_lt_if100_dev.npz") as held:
            x, y, x_dev, y_dev, names = (held[name] for name in ("x_train", "y_train", "x_dev", "y_dev", "classes"))
        with np.load(folder / "cifar100_stream_unlabelled.npz") as held:
            x_stream = held["x"][: 2000 if quick else None]
        self.names = tuple(map(str, names))
        self.all = Split("large_train", [png(image) for image in x], y.astype(np.int64))
        self.stream = Split("stream", [png(image) for image in x_stream], None)
        dev = Split("dev", [png(image) for image in x_dev], y_dev.astype(np.int64))
        order = np.random.default_rng(0).permutation(len(dev))  # not by seed: differences are paired over the test's samples
        self.selection, self.test = dev.take(np.sort(order[:SELECTION])), dev.take(np.sort(order[SELECTION:]))
        self.frequency = np.bincount(self.all.y, minlength=len(self.names))
        many, few = self.frequency > 100, self.frequency < 20
        self.groups = {"many": many, "medium": ~many & ~few, "few": few}

    def edge(self, seed: int) -> Split:
        """A fifth of each class of the long tail, one image or more."""
        random = np.random.default_rng(seed)
        rows = [random.permutation(np.flatnonzero(self.all.y == c))[: max(1, round(FIFTH * n))] for c, n in enumerate(self.frequency)]
        return self.all.take(np.sort(np.concatenate(rows)))

    def by_group(self, right: Bool) -> dict[str, float]:
        """Accuracy on the test per group, and of all."""
        return {name: float(right[member[self.test.y]].mean()) for name, member in self.groups.items()} | {"all": float(right.mean())}


def make_task(data: Data, options: argparse.Namespace) -> Task:
    recipe = {"depth": options.depth, "width": options.width, "epochs": options.epochs, "batch": options.batch}
    net = NetSpec(**recipe, learning_rate=options.rate, balance=options.balance)
    preprocess = PreprocessSpec(kind="image", mean=MEAN, std=STD)
    if options.small == "efficientnet-lite":  # its weights want their own mean and std, the default
        net, preprocess = msgspec.structs.replace(net, frozen=True), PreprocessSpec(kind="image", size=options.size)
    large = LARGE[options.large]
    if options.quick and not large.net.frozen:
        large = msgspec.structs.replace(large, net=msgspec.structs.replace(large.net, epochs=2))
    return Task(
        id="cifar100-lt",
        labels=data.names,
        modality="image",
        preprocess=preprocess,
        small=SmallSpec(kind=options.small, net=net),
        judge=JudgeSpec(folds=5 if net.frozen else 2),  # a head costs seconds, a net minutes
        large=large,
        distill=DistillSpec(temperature=options.temperature, teacher_weight=options.teacher_weight),
    )


def answers(task: Task, data: Data, folder: Path, steps: Steps) -> Callable[[Sequence[Any]], Float32]:
    """The large model's logits for the stream, the test and the selection, fitted and asked once; kept in `folder`."""
    asked = list(dict.fromkeys([*data.stream.payloads, *data.test.payloads, *data.selection.payloads]))
    edge = list(data.all.payloads)  # a round 0 asks about its own labels, to gauge ε_l by
    kept = folder / "answers.npz"
    described = msgspec.json.encode([task.large, task.labels])
    if kept.exists():
        with np.load(kept) as held:
            if held["of"].tobytes() == described and len(held["logits"]) == len(asked) + len(edge):
                return _known(asked + edge, held["logits"])
    steps("large model: fit, then asked about everything once")
    large = LargeInProcess(task, folder / "large", data.all, steps, hints=False)
    logits = large.logits(asked + edge)
    np.savez(kept, logits=logits, of=np.frombuffer(described, np.uint8))
    return _known(asked + edge, logits)


def _known(payloads: Sequence[Any], logits: Float32) -> Callable[[Sequence[Any]], Float32]:
    place = {payload: row for row, payload in enumerate(payloads)}
    return lambda wanted: logits[[place[payload] for payload in wanted]]


def one_seed(task: Task, data: Data, teacher: Any, seed: int, method: str, options: argparse.Namespace, steps: Steps) -> SeedResult:
    def say(text: str) -> None:
        steps(f"seed {seed}, {method}: {text}")

    setting = Setting(
        task=task,
        kind=load_vision(task, say),
        train=data.edge(seed),
        stream=data.stream,
        test=data.test,
        teacher=teacher,
        large_test=teacher(data.test.payloads),
        rounds=options.rounds,
        share=options.share,
        floor=False,
        frequency=data.frequency,
        selection=data.selection,
    )
    return simulate_seed(setting, seed, say, method)


def grouped(data: Data, results: list[SeedResult], large_right: Bool) -> list[dict[str, Any]]:
    """Per round and system the accuracy of each group, mean over seeds."""
    rows = []
    for number in range(len(results[0].rows)):
        systems = {
            "small": [r.right[number]["kcm"][0.0].right for r in results],
            "kcm": [r.right[number]["kcm"][AT].right for r in results],
        }
        found = {name: _mean([data.by_group(right) for right in rights]) for name, rights in systems.items()}
        rows.append({"round": number, **found, "large": data.by_group(large_right)})
    return rows


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def against_large(results: list[SeedResult], large_right: Bool) -> dict[str, float]:
    """KCM at 30 % calls minus the large model, in accuracy, paired over seeds and samples."""
    differences = np.array([r.right[-1]["kcm"][AT].right.astype(float) - large_right for r in results])
    mean, low, high = paired_interval(differences)
    return {"mean": mean, "low": low, "high": high}


def report(summary: dict[str, Any]) -> str:
    lines = [
        f"CIFAR-100-LT, {summary['seeds']} seeds, {summary['cpu_seconds']:.0f} CPU-s; accuracy in %, differences in points, 95 % intervals"
    ]
    for name, found in summary["methods"].items():
        lines += ["", f"{name}: accuracy by target share of cloud calls" + "".join(f"{float(rate):>8.0%}" for rate in RATES)]
        for row in found["curve"]:
            lines.append(f"  round {row['round']}" + " " * 35 + "".join(f"{100 * row[rate]:8.1f}" for rate in RATES))
        lines.append("  many / medium / few / all")
        for row in found["groups"]:
            cells = (
                f"{system} {' / '.join(f'{100 * value:.1f}' for value in row[system].values())}" for system in ("small", "kcm", "large")
            )
            lines.append(f"  round {row['round']}: " + "   ".join(cells).replace("kcm", f"{name} at 30 %"))
        lines.append(f"  at 30 % calls ({found['realised']:.1%} realised) minus the large model: {_interval(found['minus_large'])}")
        for pair, at in found["paired"].items():
            lines.append(f"  {pair.replace('_minus_', ' − ').replace('kcm', name)} at 30 %: {_interval(at['0.3'])}")
    for pair, at in summary.get("between", {}).items():
        lines.append(f"{pair.replace('_minus_', ' − ')} at 30 %: {_interval(at['0.3'])}")
    return "\n".join(lines)


def _interval(d: dict[str, float]) -> str:
    return f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"


def summarised(data: Data, results: dict[str, list[SeedResult]], large_right: Bool, seconds: float) -> dict[str, Any]:
    methods = {}
    for name, of_name in results.items():
        whole = summarise(of_name)
        curve = [
            {"round": n, **{rate: float(np.mean([r.rows[n]["curve"][rate]["accuracy"] for r in of_name])) for rate in RATES}}
            for n in range(len(of_name[0].rows))
        ]
        methods[name] = {
            "curve": curve,
            "groups": grouped(data, of_name, large_right),
            "minus_large": against_large(of_name, large_right),
            "realised": whole["mean"]["curve"]["0.3"]["realised_rate"],
            "paired": whole["paired"],
            "seeds": whole["seeds"],
        }
    summary: dict[str, Any] = {"schema": 1, "seeds": len(next(iter(results.values()))), "methods": methods, "cpu_seconds": seconds}
    return summary | ({"between": compare_methods(results)} if len(results) > 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", default="kcm,mcm")
    parser.add_argument("--large", choices=LARGE, default="efficientnet-lite")
    parser.add_argument("--small", choices=("resnet", "efficientnet-lite"), default="resnet", help="the second: frozen, at --size pixels")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.2, help="largest learning rate")
    parser.add_argument("--balance", default="softmax")
    parser.add_argument("--temperature", type=float, default=0.6, help="of distillation")
    parser.add_argument("--teacher-weight", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the stream that may be asked about")
    parser.add_argument("--quick", action="store_true", help="one seed, one round, 4 epochs, 2,000 images of the stream")
    parser.add_argument("--keep", type=Path, help="folder for the large model and its answers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.epochs = 1, 1, 4
    one_thread()
    steps, started = Steps(), time.process_time()
    data = Data(options.data, quick=options.quick)
    task = make_task(data, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        teacher = answers(task, data, folder, steps)
        large_right = teacher(data.test.payloads).argmax(1) == data.test.y
        steps(f"large model: {large_right.mean():.3f} on test, {time.process_time() - started:.0f} CPU-s")
        results: dict[str, list[SeedResult]] = {name: [] for name in options.methods.split(",")}
        for seed in range(options.first, options.first + options.seeds):
            for name, found in results.items():
                began = time.process_time()
                found.append(one_seed(task, data, teacher, seed, name, options, steps))
                steps(f"seed {seed}, {name}: {time.process_time() - began:.0f} CPU-s")
            if options.out:
                options.out.write_text(json.dumps(summarised(data, results, large_right, time.process_time() - started)))
        print(report(summarised(data, results, large_right, time.process_time() - started)))


if __name__ == "__main__":
    main()
