"""Rounds of the closed loop, in memory: escalate a share of the stream, learn from the large model's logits, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.policy import epsilon_for_rate
from kcm.sample import Payload
from kcm.task import Task
from training.data import Split, taken
from training.distil import gauged, round_examples
from training.fit import fit, one_hot
from training.judge import Predictions
from training.reserve import SHARE as RESERVED
from training.reservoir import survivors
from training.select import Taught
from training.small import Examples, Small

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
Teacher = Callable[[Sequence[Payload]], Float32]  # samples → logits [N, C], without a hint


@dataclass(frozen=True)
class Stream:
    """One seed's order of the unlabelled stream: chunks of indices that arrive round by round, and the reserve."""

    chunks: list[Index]
    reserve: Index

    @classmethod
    def draw(cls, size: int, rounds: int, seed: int) -> Stream:
        """Raises DataError for a stream of which nothing can be kept back."""
        if round(RESERVED * size) < 1:
            raise DataError(f"the stream has {size} rows; a simulation needs at least {round(1 / RESERVED)}")
        order = np.random.default_rng(seed).permutation(size)
        cut = round(RESERVED * size)
        return cls(list(np.array_split(order[cut:], rounds)) if rounds else [], order[:cut])


class Loop:
    """The state between rounds. Features of the stream are made once; teacher logits only for what was escalated."""

    def __init__(self, task: Task, kind: Small, train: Split, stream: Split, teacher: Teacher, *, seed: int, features: Any = None) -> None:
        """`features` of the stream, where they are made already."""
        n, classes = len(train), len(task.labels)
        self._task, self._kind, self._teacher, self._seed = task, kind, teacher, seed
        self._stream = stream
        self._features = kind.featurise(stream.payloads) if features is None else features
        ones = np.ones(n, np.float32)
        self._labelled = Examples(kind.featurise(train.payloads), one_hot(train.y, classes), ones, ones > 0, ones < 0)
        self._logits = np.zeros((0, classes), np.float32)
        self._p_escalate = np.zeros(0, np.float32)
        self._explored = np.zeros(0, bool)
        self.escalated: Index = np.zeros(0, np.int64)
        self._rounds = 0
        self.taught = Taught(Predictions(self._logits, self._p_escalate, self._p_escalate), self._logits)  # of no sample yet
        self.passed = 1.0  # share of teacher rows above ε_l in the last round
        self.fitted = fit(task, kind, self._labelled, seed=seed)
        small_accuracy = float((self.fitted.out_of_fold.logits.argmax(1) == train.y).mean())
        asked = task.distill.teacher_epsilon == "auto"
        self.spec = gauged(task.distill, teacher(train.payloads), train.y, small_accuracy) if asked else task.distill

    def predict(self, index: Index) -> Predictions:
        """The current small model's predictions for stream samples [N]."""
        return self._kind.predict(self.fitted.small, self._kind.take(self._features, index))

    def advance(self, chunk: Index, reserve: Index, share: float) -> None:
        """Ask about at most `share` of a chunk, then refit on labels and on the teacher logits so far, within the caps."""
        chosen, p_escalate, explored = self._escalate(chunk, reserve, share)
        logits = self._teacher(taken(self._stream.payloads, chosen)) if len(chosen) else self._logits[:0]
        self.escalated = np.concatenate([self.escalated, chosen])
        self._logits = np.concatenate([self._logits, logits])
        self._p_escalate = np.concatenate([self._p_escalate, p_escalate])
        self._explored = np.concatenate([self._explored, explored])
        self._rounds += 1
        taught = self._taught()
        examples, self.passed, used = round_examples(
            self._kind,
            self._labelled,
            self.fitted.out_of_fold.take(np.arange(len(self._labelled))),
            self.fitted.judge,
            self._kind.take(self._features, self.escalated[taught]),
            self._logits[taught],
            self.spec,
            p_escalate=self._p_escalate[taught],
            seed=(self._seed, self._rounds),
        )
        self.fitted = fit(self._task, self._kind, examples, seed=self._seed)
        self.taught = Taught(self.fitted.out_of_fold.take(np.flatnonzero(~examples.labelled)), self._logits[taught][used])

    def _escalate(self, chunk: Index, reserve: Index, share: float) -> tuple[Index, Float32, Mask]:
        """Which samples are asked about [K], with which probability each came to be [K], and which of them are explored ones [K].

        The policy on a stream: ε from fresh traffic, a little exploration, and the budget as a cap; or the budget at random.
        """
        random, most = np.random.default_rng([self._seed, len(self.escalated)]), int(share * len(chunk))
        if self.spec.at_random:
            chosen = np.sort(random.choice(len(chunk), most, replace=False))
            return chunk[chosen], np.full(most, share, np.float32), np.zeros(most, bool)
        explore = self.spec.explore
        epsilon = epsilon_for_rate(self.fitted.judge.confidence(self.predict(reserve)), max(0.0, share - explore))
        explored = random.random(len(chunk)) < explore
        unsure = self.fitted.judge.confidence(self.predict(chunk)) <= epsilon
        chosen = np.flatnonzero(unsure | explored)[:most]
        return chunk[chosen], np.where(unsure, 1.0, explore)[chosen].astype(np.float32), (explored & ~unsure)[chosen]

    def _taught(self) -> Index:
        """The escalated samples that the caps leave: places in `escalated`. Each counts as another device's."""
        drawn = np.random.default_rng([self._seed, len(self._stream)]).random(len(self._stream))[self.escalated]
        return survivors(drawn + ~self._explored, self._logits.argmax(1), self.escalated, self.spec)
