"""The demo's steps, in order: fit, serve, stream, distil, swap, stream again, compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kcm.app.demo.display import watching
from kcm.app.demo.processes import running
from kcm.app.demo.traffic import Pass, stream, wait_for_bundle
from kcm.app.distill import held_back
from kcm.app.export import export_run
from kcm.app.models import LargeInProcess, load_small_kind
from kcm.app.progress import Steps
from kcm.app.samples import scores
from kcm.errors import UnavailableError
from kcm.sample import Route
from kcm.task import Task
from training.calibrate import for_accuracy
from training.data import Split, load_split
from training.evaluate import Routed, route
from training.program import distil_run, train_run
from training.run import Run, save_run
from training.small import Small

_BATCH = 32  # documents a call while learning; the compared passes go one by one


@dataclass(frozen=True)
class Sizes:
    """Documents of each part: sized so that the demo ends within three minutes on two cores (about 25 ms each in the cloud)."""

    large_train: int = 1000
    stream: int = 2200
    calibration: int = 350  # twice: once before, once after
    test: int = 500


BELOW_LARGE = 0.02  # both calibrations: the fewest calls that cost at most this much accuracy against always asking


@dataclass(frozen=True)
class Parts:
    """The demo's splits; `late` are the calibration labels that come in after the first round."""

    train: Split
    large_train: Split
    stream: Split
    early: Split
    late: Split
    test: Split


@dataclass(frozen=True)
class Curve:
    """C_x [N] on the test documents, and whether the small model is right there [N]: enough for every ε."""

    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """What was measured on the test documents. The passes went through the daemon; control is computed from their answers."""

    task: Task
    parts: Parts
    small: Pass
    large: Pass
    before: Pass
    after: Pass
    control: Routed
    learning: Pass  # the unlabelled stream
    runs: tuple[Run, Run]
    curves: tuple[Curve, Curve]  # before, after
    target: str
    seconds: float


def parts_of(task: Task, sizes: Sizes, seed: int) -> Parts:
    """Random parts of the task's files; the edge's labels stay inside the large model's."""
    rng = np.random.default_rng(seed)

    def some(split: Split, count: int) -> Split:
        return split.take(rng.permutation(len(split))[:count])

    train, large = load_split(task, "train"), load_split(task, "large_train")
    edge = set(train.payloads)
    others = some(large.take([i for i, text in enumerate(large.payloads) if text not in edge]), max(0, sizes.large_train - len(train)))
    calibration = some(load_split(task, "calibration"), 2 * sizes.calibration)
    half = len(calibration) // 2
    return Parts(
        train=train,
        large_train=Split("large_train", [*train.payloads, *others.payloads], np.concatenate([train.y, others.y])),
        stream=some(load_split(task, "stream"), sizes.stream),
        early=calibration.take(np.arange(half)),
        late=calibration.take(np.arange(half, 2 * half)),
        test=some(load_split(task, "test"), sizes.test),
    )


class Demo:
    """Runs the steps in a folder: runs/, bundles/, store/, edge/ and logs appear there."""

    def __init__(self, task: Task, sizes: Sizes, folder: Path, *, seed: int, steps: Steps) -> None:
        self._task, self._folder, self._seed, self._steps = task, folder, seed, steps
        self._parts = parts_of(task, sizes, seed)
        self._bundles = folder / "edge" / "bundles"

    def run(self) -> Outcome:
        """All of it. Raises UnavailableError where a process doesn't start or the swap doesn't happen."""
        steps, parts, folder = self._steps, self._parts, self._folder
        steps(f"large model {self._task.large.model}: a head on {len(parts.large_train)} labelled documents")
        large = LargeInProcess(self._task, folder / "large", parts.large_train, Steps(quiet=True))
        steps(f"small model and judge on {len(parts.train)} labels")
        kind = load_small_kind(self._task, steps)
        first = train_run(self._task, kind, parts.train, None, seed=self._seed, progress=steps)
        first = self._calibrated(first, kind, large, parts.early)
        self._install(first, "round-0")
        steps("starting kcm cloud and kcm edge")
        cloud_arguments = ("--task", self._task.root, "--large", str(folder / "large"), "--store", str(folder / "store"))
        with running("cloud", *cloud_arguments, "--listen", "127.0.0.1:0", log=folder / "cloud.log") as cloud:
            # Nothing explored: it would reach the store, and the cloud beside the compared passes, when chance has it.
            edge_arguments = ("--store", str(self._bundles), "--state", str(folder / "edge"), "--deadline-ms", "60000", "--explore", "0")
            with running("edge", *edge_arguments, "--listen", "127.0.0.1:0", "--cloud", cloud, log=folder / "edge.log") as edge:
                return self._serve(edge, first, kind, large)

    def _serve(self, edge: str, first: Run, kind: Small, large: LargeInProcess) -> Outcome:
        steps, test = self._steps, self._parts.test
        learning = self._pass(edge, "unlabelled stream", self._parts.stream, batch=_BATCH)
        rows = self._compact()  # before the test documents pass: they are never distilled
        steps("the same test documents: never, always and by the judge through the cloud")
        small = self._pass(edge, "always small", test, asked=Route.LOCAL)
        always = self._pass(edge, "always large", test, asked=Route.CLOUD)
        before = self._pass(edge, "KCM before", test)
        steps(f"distilling {rows} answers of the large model")
        second = self._distil(first, kind, large)
        self._install(second, "round-1")
        if not wait_for_bundle(edge, (self._folder / "runs" / "round-1" / "bundle_id").read_text()):
            raise UnavailableError("the edge didn't take the new bundle", fix=f"see {self._folder / 'edge.log'}")
        steps("the edge swapped to the new bundle")
        after = self._pass(edge, "KCM after", test)
        recalibrated = self._calibrated(first, kind, large, self._parts.late)
        curves = self._curve(first, kind), self._curve(second, kind)
        control = route(curves[0].confidence, curves[0].right, always.right(test.y), recalibrated.threshold.epsilon)
        return Outcome(
            task=self._task,
            parts=self._parts,
            small=small,
            large=always,
            before=before,
            after=after,
            control=control,
            learning=learning,
            runs=(first, second),
            curves=curves,
            target=f"at most {100 * BELOW_LARGE:g} points below the large model, on labels kept back",
            seconds=steps.seconds,
        )

    def _curve(self, run: Run, kind: Small) -> Curve:
        score, answers = scores(run, kind, self._parts.test.payloads)
        return Curve(score, answers == self._parts.test.y)

    def _pass(self, edge: str, title: str, split: Split, *, asked: Route = Route.AUTO, batch: int = 1) -> Pass:
        truth = split.labels if split.labels is not None else np.full(len(split), -1)
        with watching(title, truth) as watch:
            return stream(edge, split.payloads, route=asked, batch=batch, watch=watch)

    def _calibrated(self, run: Run, kind: Small, large: LargeInProcess, split: Split) -> Run:
        """ε with the fewest calls that is at most BELOW_LARGE less accurate than the large model on labels that were kept back."""
        score, answers = scores(run, kind, split.payloads)
        large_right = large.logits(split.payloads).argmax(1) == split.y
        threshold = for_accuracy(score, answers == split.y, large_right, float(large_right.mean()) - BELOW_LARGE)
        return replace(run, threshold=threshold)

    def _install(self, run: Run, name: str) -> None:
        """Save, export, verify, and into the device's bundle store."""
        from edge_runtime.bundles import BundleStore

        save_run(self._folder / "runs" / name, run)
        export_run(self._folder / "runs" / name, self._folder / "bundles" / name, force=False)
        BundleStore(self._bundles).install(self._folder / "bundles" / name)

    def _compact(self) -> int:
        from cloud_server.compact import compact

        return int(compact(self._folder / "store").written)

    def _distil(self, first: Run, kind: Small, large: LargeInProcess) -> Run:
        from training.teacher_rows import read_lessons

        lessons = read_lessons(self._folder / "store", self._task, held_back=held_back(self._task))
        parent = (self._folder / "runs" / "round-0" / "bundle_id").read_text()
        new = distil_run(
            first,
            kind,
            self._parts.train,
            None,
            lessons.payloads,
            lessons.logits,
            parent=parent,
            teacher_id=lessons.teacher_id,
            gauge=(large.logits(self._parts.early.payloads), self._parts.early.y),
            seed=self._seed,
            progress=self._steps,
        )
        return self._calibrated(new, kind, large, self._parts.late)
