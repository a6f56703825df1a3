"""Does the hint help the large model, and does the gate know? Never, always and gated, where the small model was right and where wrong.

    python -m benchmarks.hint --model minilm --dropout 0.3
    python -m benchmarks.hint --model smollm2

A seed draws the edge's labels, so each has its own small model, judge and hints. Of the documents, which neither model has seen, the
half with the lowest C_x escalates. It is divided at random: the gate for each half is fitted on the other, so every sample is judged
by a gate that hasn't seen it. One large model serves all seeds; the encoder is fitted with the hints of the first.
Regret: accuracy of the better of never and always (all candidates), less that of the gate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_server.models import LargeModel, load_large
from cloud_server.prompt import Prompt
from kcm.app.hint import MOST, hints_by_arm
from kcm.app.models import LargeInProcess, load_small_kind, one_thread
from kcm.app.progress import Steps
from kcm.assets import task_path
from kcm.calibration import Arm, HintGate
from kcm.sample import Hint
from kcm.task import Task, load_task
from training.data import Split, load_split
from training.evaluate import paired_interval
from training.hint import Rule, fit_gate
from training.program import train_run

Bool = NDArray[np.bool_]
RATE = 0.5  # of the documents, how many escalate
DIVISIONS = 50  # of a seed's samples, for a regret that hangs less on one division's luck


@dataclass(frozen=True)
class Setting:
    """What runs in minutes on one core: the causal model reads 48 tokens of a document and has 8 labels, not 52, to score."""

    classes: int
    per_class: int  # labels of the edge
    documents: int
    max_tokens: int


SETTINGS = {"minilm": Setting(52, 3, 1200, 128), "smollm2": Setting(8, 2, 480, 48)}


@dataclass(frozen=True)
class Outcome:
    """One seed's escalated samples [E]: their places among the documents, C_x, and who was right."""

    rows: NDArray[np.int64]
    confidence: NDArray[np.float32]
    small: Bool
    arms: dict[Arm, Bool]


class Asked:
    """The large model's answers, each text and hint's sentence asked about once."""

    def __init__(self, model: LargeModel, prompt: Prompt) -> None:
        self._model, self._prompt, self._known = model, prompt, dict[tuple[str, str], int]()

    def answers(self, texts: Sequence[str], hints: Sequence[Hint | None]) -> NDArray[np.int64]:
        keys = [(text, self._prompt.hint(hint)) for text, hint in zip(texts, hints, strict=True)]
        new = {key: (key[0], hint) for key, hint in zip(keys, hints, strict=True) if key not in self._known}
        if new:
            found = self._model.logits([text for text, _ in new.values()], [hint for _, hint in new.values()]).argmax(1)
            self._known.update(zip(new, found.tolist(), strict=True))
        return np.array([self._known[key] for key in keys])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), default="minilm")
    parser.add_argument("--task", default="r52")
    parser.add_argument("--dropout", type=float, default=0.3, help="of hints, when the encoder's head is fitted")
    parser.add_argument("--seeds", type=int, default=5)
    for name in ("classes", "per-class", "documents", "max-tokens"):
        parser.add_argument(
            f"--{name}", type=int, help="default: " + ", ".join(f"{getattr(s, name.replace('-', '_'))} ({m})" for m, s in SETTINGS.items())
        )
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.model]
    given = {name: value for name, value in vars(arguments).items() if name in Setting.__annotations__ and value is not None}
    setting = Setting(**{**vars(setting), **given})
    one_thread()
    begun = time.process_time()
    outcomes, about = measure(arguments.task, arguments.model, setting, arguments.dropout, arguments.seeds, Steps())
    print(about)
    report(outcomes, setting.documents)
    print(f"{time.process_time() - begun:.0f} CPU-seconds on one thread")


def measure(name: str, model: str, setting: Setting, dropout: float, seeds: int, steps: Steps) -> tuple[list[Outcome], str]:
    whole = load_task(task_path(name))
    large_train = load_split(whole, "large_train")
    frequent = np.sort(np.argsort(-np.bincount(large_train.y, minlength=len(whole.labels)), kind="stable")[: setting.classes])
    kind = "encoder" if model == "minilm" else "causal"
    large = msgspec.structs.replace(whole.large, kind=kind, model=model, max_tokens=setting.max_tokens, hint_dropout=dropout)
    task = msgspec.structs.replace(whole, labels=tuple(whole.labels[c] for c in frequent), large=large)
    train, large_train, calibration, test = (_only(load_split(whole, s), frequent) for s in ("train", "large_train", "calibration", "test"))
    pool = Split("pool", [*calibration.payloads, *test.payloads], np.concatenate([calibration.y, test.y]))
    pool = pool.take(np.random.default_rng(0).permutation(len(pool))[: setting.documents])
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        edges = [_edge(task, train, setting.per_class, seed, Path(scratch) / str(seed)) for seed in range(seeds)]
        LargeInProcess(edges[0], Path(scratch) / "large", large_train, steps)
        asked = Asked(load_large(Path(scratch) / "large"), Prompt(task.prompt, task.labels))
        for seed, edge in enumerate(edges):
            steps(f"seed {seed}")
            outcomes.append(_outcome(edge, pool, seed, asked, steps))
    fitted = f", its head fitted on {len(large_train)} documents with hint dropout {dropout}" if kind == "encoder" else ", not fitted"
    return outcomes, (
        f"{name}, {len(task.labels)} classes, {setting.per_class} labels a class on the edge\n"
        f"{model}, {setting.max_tokens} tokens of a document{fitted}\n"
        f"{seeds} seeds; the {RATE:.0%} with the lowest C_x of {len(pool)} documents escalate"
    )


def _only(split: Split, classes: NDArray[np.int64]) -> Split:
    """The rows of these classes, which become 0, 1, …"""
    kept = split.take(np.flatnonzero(np.isin(split.y, classes)))
    return Split(split.name, kept.payloads, np.searchsorted(classes, kept.y))


def _edge(task: Task, train: Split, per_class: int, seed: int, folder: Path) -> Task:
    """The task of an edge with few labels: its train file holds `per_class` rows of each class."""
    order = np.random.default_rng(seed).permutation(len(train))
    chosen = np.concatenate([order[train.y[order] == c][:per_class] for c in range(len(task.labels))])
    folder.mkdir()
    rows = [{task.data.text_column: train.payloads[i], task.data.label_column: task.labels[train.y[i]]} for i in chosen]
    (folder / "train.jsonl").write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    return msgspec.structs.replace(task, root=str(folder), data=msgspec.structs.replace(task.data, train="train.jsonl"))


def _outcome(task: Task, pool: Split, seed: int, asked: Asked, steps: Steps) -> Outcome:
    kind = load_small_kind(task, steps)
    run = train_run(task, kind, load_split(task, "train"), None, seed=seed, progress=steps)
    predictions = kind.predict(run.small, kind.featurise(pool.payloads))
    confidence = run.judge.confidence(predictions)
    rows = np.sort(np.argsort(confidence, kind="stable")[: round(RATE * len(pool))])
    away, seen = pool.take(rows), predictions.take(rows)
    arms: dict[Arm, Bool] = {}
    for arm, hints in hints_by_arm(seen.logits, confidence[rows]).items():
        steps(f"large model: {len(rows)} documents, {arm}")
        arms[arm] = asked.answers(away.payloads, hints) == away.y
    return Outcome(rows, confidence[rows], seen.logits.argmax(1) == away.y, arms)


def gated(outcome: Outcome, seed: int) -> tuple[Bool, list[HintGate]]:
    """[E], what is right where the gate of each half is fitted on the other (on at most MOST of it), and the two gates."""
    order = np.random.default_rng(seed).permutation(len(outcome.rows))
    halves = np.array_split(order, 2)
    right, gates = np.zeros(len(order), bool), []
    for tested, other in (halves, halves[::-1]):
        fitted = other[:MOST]
        gates.append(fit_gate({arm: values[fitted] for arm, values in outcome.arms.items()}, outcome.confidence[fitted]))
        rule = Rule(gates[-1].arm, gates[-1].lowest)
        right[tested] = rule.right({arm: values[tested] for arm, values in outcome.arms.items()}, outcome.confidence[tested])
    return right, gates


def report(outcomes: list[Outcome], documents: int) -> None:
    fitted = [gated(outcome, seed) for seed, outcome in enumerate(outcomes)]
    columns = {"never": [o.arms["none"] for o in outcomes], "candidates": [o.arms["candidates"] for o in outcomes]}
    columns |= {"assertion": [o.arms["assertion"] for o in outcomes], "gated": [right for right, _ in fitted]}
    smalls = [o.small for o in outcomes]
    splits = {"all": [s | True for s in smalls], "small model right": smalls, "small model wrong": [~s for s in smalls]}
    print(f"small model there {_mean_sd([s.mean() for s in smalls])} %\n\n{'':18}{'n':>6}" + "".join(f"{name:>15}" for name in columns))
    for split, rows in splits.items():
        cells = [_mean_sd([right[r].mean() for right, r in zip(rights, rows, strict=True)]) for rights in columns.values()]
        print(f"{split:18}{np.mean([r.sum() for r in rows]):6.0f}" + "".join(f"{cell:>15}" for cell in cells))
    print("\npaired differences in points [95 %], documents and seeds resampled")
    pairs = [("candidates", "never"), ("assertion", "never"), ("gated", "never"), ("gated", "candidates"), ("gated", "assertion")]
    for one, other in pairs:
        cells = []
        for rows in splits.values():
            cells.append(_difference(outcomes, columns[one], columns[other], rows, documents))
        print(
            f"{one + ' − ' + other:24}" + "".join(f"{name}: {cell:24}" for name, cell in zip(("all", "right", "wrong"), cells, strict=True))
        )
    regrets = [_regret(o, right) for o, (right, _) in zip(outcomes, fitted, strict=True)]
    better = max(np.mean([o.arms[arm].mean() for o in outcomes]) for arm in ("none", "candidates"))
    of_means = better - np.mean([right.mean() for right, _ in fitted])
    drawn = [np.mean([_regret(o, gated(o, 1000 + d)[0]) for d in range(DIVISIONS)]) for o in outcomes]
    print(f"\nregret of the gate in points: {100 * of_means:+.2f} on all seeds together")
    print(f"  by seed, each against its own better one: {_signed(regrets)}: mean {100 * np.mean(regrets):+.2f}, sd {_sd(regrets):.2f}")
    print(f"  the same over {DIVISIONS} divisions a seed:       {_signed(drawn)}: mean {100 * np.mean(drawn):+.2f}, sd {_sd(drawn):.2f}")
    for seed, (_, gates) in enumerate(fitted):
        print(f"gates of seed {seed}: " + "; ".join(f"{g.arm}" + (f" where C_x ≥ {g.lowest:.3f}" if g.lowest else "") for g in gates))


def _regret(outcome: Outcome, right: Bool) -> float:
    return float(max(outcome.arms["none"].mean(), outcome.arms["candidates"].mean()) - right.mean())


def _difference(outcomes: list[Outcome], one: list[Bool], other: list[Bool], rows: list[Bool], documents: int) -> str:
    """Per sample of `rows`. What didn't escalate, or isn't among them, differs by nothing: so documents are resampled whole."""
    filled = np.zeros((len(outcomes), documents))
    for seed, outcome in enumerate(outcomes):
        filled[seed, outcome.rows] = (one[seed].astype(float) - other[seed]) * rows[seed]
    share = sum(int(r.sum()) for r in rows) / filled.size
    mean, low, high = (100 * value / share for value in paired_interval(filled))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _mean_sd(shares: Sequence[float]) -> str:
    return f"{100 * np.mean(shares):.1f} ± {_sd(shares):.1f}"


def _sd(shares: Sequence[float]) -> float:
    return float(100 * np.std(shares, ddof=1)) if len(shares) > 1 else 0.0


def _signed(shares: Sequence[float]) -> str:
    return " ".join(f"{100 * value:+.2f}" for value in shares)


if __name__ == "__main__":
    main()
