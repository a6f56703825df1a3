"""Rounds of the closed loop, in memory: escalate a share of the stream, learn from the large model's logits, repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.policy import epsilon_for_rate
from kcm.task import Task
from training.data import Split
from training.distil import gauged, round_examples
from training.fit import fit, one_hot
from training.judge import Predictions
from training.reserve import SHARE as RESERVED
from training.small import Examples, Small

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Teacher = Callable[[list[str]], Float32]  # texts → logits [N, C], without a hint

EXPLORED = 0.02  # share of a round's samples that is asked about at random, so that labels aren't hard ones alone


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

    def __init__(self, task: Task, kind: Small, train: Split, stream: Split, teacher: Teacher, *, seed: int) -> None:
        n, classes = len(train), len(task.labels)
        self._task, self._kind, self._teacher, self._seed = task, kind, teacher, seed
        self._stream = stream
        self._features = kind.featurise(stream.texts)
        ones = np.ones(n, np.float32)
        self._labelled = Examples(kind.featurise(train.texts), one_hot(train.y, classes), ones, ones > 0, ones < 0)
        self._logits = np.zeros((0, classes), np.float32)
        self.escalated: Index = np.zeros(0, np.int64)
        self.passed = 1.0  # share of teacher rows above ε_l in the last round
        self.fitted = fit(task, kind, self._labelled, seed=seed)
        small_accuracy = float((self.fitted.out_of_fold.logits.argmax(1) == train.y).mean())
        asked = task.distill.teacher_epsilon == "auto"
        self.spec = gauged(task.distill, teacher(train.texts), train.y, small_accuracy) if asked else task.distill

    def predict(self, index: Index) -> Predictions:
        """The current small model's predictions for stream samples [N]."""
        return self._kind.predict(self.fitted.small, self._kind.take(self._features, index))

    def advance(self, chunk: Index, reserve: Index, share: float) -> None:
        """Escalate at most `share` of a chunk by the current judge, then refit on labels and all teacher logits so far."""
        chosen = self._escalate(chunk, reserve, share)
        logits = self._teacher([self._stream.texts[i] for i in chosen])
        self.escalated = np.concatenate([self.escalated, chosen])
        self._logits = np.concatenate([self._logits, logits])
        examples, self.passed, _ = round_examples(
            self._kind,
            self._labelled,
            self.fitted.out_of_fold.take(np.arange(len(self._labelled))),
            self.fitted.judge,
            self._kind.take(self._features, self.escalated),
            self._logits,
            self.spec,
        )
        self.fitted = fit(self._task, self._kind, examples, seed=self._seed)

    def _escalate(self, chunk: Index, reserve: Index, share: float) -> Index:
        """The policy on a stream: ε from fresh traffic, a little exploration, and the budget as a cap."""
        epsilon = epsilon_for_rate(self.fitted.judge.confidence(self.predict(reserve)), max(0.0, share - EXPLORED))
        explored = np.random.default_rng([self._seed, len(self.escalated)]).random(len(chunk)) < EXPLORED
        unsure = self.fitted.judge.confidence(self.predict(chunk)) <= epsilon
        return chunk[unsure | explored][: int(share * len(chunk))]
