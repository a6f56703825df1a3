"""One request's way: decide on the device, ask the cloud for the rest, keep what it could not take, answer. And what is learned from it.

Also the in-process form with a cloud: Router(config, runtime, client=..., spool=..., stats=...).infer(samples).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

import msgspec

from edge_runtime.cloud_client import CloudClient, Failure, Kind, Prediction, Receipt
from edge_runtime.config import EdgeConfig
from edge_runtime.decider import TURN, Decider, Serving
from edge_runtime.drift import Drift
from edge_runtime.explorer import Explorer
from edge_runtime.messages import cloud_answer, to_predict
from edge_runtime.runtime import NO_CLOUD, Decision, EdgeRuntime, InvalidSample, check_samples, degraded
from edge_runtime.spool import Spool, Waiting
from edge_runtime.stats import Stats
from edge_runtime.truths import Truth
from kcm.errors import StoreError
from kcm.logs import Alarm
from kcm.policy import explores, gate_hint
from kcm.sample import Answer, Purpose, Route, Sample, Source, Tensors, scores_from_proto
from protos.kcm.v1 import cloud_pb2

log = logging.getLogger("kcm.edge.router")

_TENSORS = "tensors can't be sent to the cloud: give text or an image"
_MARGIN_S = 0.03  # of the application's deadline: for the spool's commit and the way back


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What became of truths: on the disk; of samples that are remembered; older ones that had to make room."""

    kept: int
    matched: int
    dropped: int


class Begun(NamedTuple):
    """Samples that the device has decided on."""

    serving: Serving
    decisions: list[Decision]
    away: list[Decision]  # those of them that don't stay here
    started: float  # perf_counter


class Router:
    """Answers samples with the current runtime. Belongs to one event loop; a swap replaces runtime and drift between requests."""

    def __init__(self, config: EdgeConfig, runtime: EdgeRuntime, *, client: CloudClient | None, spool: Spool | None, stats: Stats) -> None:
        self._serving = Serving(runtime, _drift(runtime))  # one tuple: another thread sees both or neither change
        self._client, self._spool, self._stats = client, spool, stats
        self._deadline_s = config.cloud.deadline_ms / 1000
        self._alarm = Alarm(log)
        self._decider = Decider()
        # Without a cloud nobody would ever ask for them.
        self._explorer = Explorer(config.explore, spool, stats) if config.explore > 0 and client is not None and spool is not None else None

    @property
    def runtime(self) -> EdgeRuntime:
        """What serves now."""
        return self._serving.runtime

    @property
    def drift(self) -> Drift:
        return self._serving.drift

    async def infer(self, samples: Sequence[Sample], budget_s: float | None = None) -> list[Answer]:
        """Answer every sample, in order. What could not be answered by the cloud is in the spool when this returns.

        Args:
            budget_s: what is left of the caller's deadline; None: no deadline.

        Raises:
            InvalidSample: another modality, or a sample_id twice; the message names the sample's index.
            TypeError: no sequence of Sample.
        """
        return await self.ask(samples, budget_s)

    def ask(self, samples: Sequence[Sample], budget_s: float | None = None) -> asyncio.Future[list[Answer]]:
        """As `infer`; at once raises what the samples themselves say. Cancelling the future ends the call to the cloud."""
        started = time.perf_counter()
        check_samples(samples)
        serving = self._serving  # one bundle for the whole request
        if len(samples) > TURN:
            return asyncio.ensure_future(self._in_turns(serving, samples, budget_s, started))
        answers: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()

        def then(decided: list[Decision] | Exception) -> None:
            if answers.cancelled():
                return
            try:
                if isinstance(decided, Exception):
                    raise decided
                taken = self.taken(_begun(serving, decided, started), budget_s)
            except Exception as error:  # whoever waits must hear of it, and the others of the same run of theirs
                answers.set_exception(error)
                return
            if isinstance(taken, list):
                answers.set_result(taken)
            else:
                _follow(answers, asyncio.ensure_future(taken))

        self._decider.ask(samples, serving, then)
        return answers

    def decide(self, samples: Sequence[Sample], started: float) -> Begun:
        """The device's part alone. May be called from any thread; what it returns is for `taken`, on the event loop."""
        serving = self._serving
        return _begun(serving, serving.runtime.decide(samples), started)

    def taken(self, begun: Begun, budget_s: float | None = None) -> list[Answer] | Coroutine[Any, Any, list[Answer]]:
        """Note what was decided. The answers, or what has to be awaited for them."""
        self._note(begun.decisions, begun.serving)
        if begun.away:
            return self._finish(begun, budget_s)
        self._stats.answered(Source.LOCAL, time.perf_counter() - begun.started, len(begun.decisions))
        return [decision.answer for decision in begun.decisions]

    async def _in_turns(self, serving: Serving, samples: Sequence[Sample], budget_s: float | None, started: float) -> list[Answer]:
        """Many samples: small requests go in between."""
        decisions: list[Decision] = []
        for start in range(0, len(samples), TURN):
            part = await self._decider.decisions(samples[start : start + TURN], serving, start)
            self._note(part, serving)
            decisions += part
        return await self._finish(_begun(serving, decisions, started), budget_s)

    async def _finish(self, begun: Begun, budget_s: float | None) -> list[Answer]:
        """Ask the cloud for what doesn't stay here."""
        decisions, away, started = begun.decisions, begun.away, begun.started
        self._stats.answered(Source.LOCAL, time.perf_counter() - started, len(decisions) - len(away))
        if not away:
            return [decision.answer for decision in decisions]
        self._stats.escalations += len(away)
        if budget_s is not None:
            budget_s -= time.perf_counter() - started
        elsewhere = iter(await self._escalate(begun.serving, away, budget_s))
        elapsed = time.perf_counter() - started
        answers = [decision.answer if decision.local else next(elsewhere) for decision in decisions]
        for source in (Source.CLOUD, Source.DEGRADED):
            self._stats.answered(source, elapsed, sum(answer.source is source for answer in answers))
        return answers

    async def feedback(self, truths: Sequence[tuple[str, str]]) -> Taken:
        """Take (sample_id, label) pairs; returns after the commit. Of two about one sample the last holds.

        Raises:
            InvalidSample: a label that the task doesn't have, or no sample_id; the message names the truth's index.
            StoreError: they could not be kept, or there is no spool.
        """
        task = self.runtime.task
        ids = {label: label_id for label_id, label in enumerate(task.labels)}
        rows: dict[str, Truth] = {}
        for index, (sample_id, label) in enumerate(truths):
            if not sample_id:
                raise InvalidSample(f"truth {index} has no sample_id")
            if label not in ids:
                raise InvalidSample(f"truth {index}: {label[:80]!r} is none of the task's {len(ids)} labels")
            rows[sample_id] = Truth(sample_id=sample_id, label_id=ids[label], task_id=task.id, label_space=task.label_space)
        if self._spool is None:
            raise StoreError("there is no spool to keep truths in")
        dropped = await self._spool.truths.put(list(rows.values())) if rows else 0
        if dropped:
            self._alarm("truths", f"the spool's table of truths is full: {dropped} older ones that the cloud never got made room")
        self._stats.feedback += len(truths)
        matched = sum(self.drift.truth(row.sample_id, row.label_id) for row in rows.values())
        return Taken(kept=len(truths), matched=matched, dropped=dropped)

    def learned(self, sample: cloud_pb2.PredictSample, receipt: Receipt) -> None:
        """The cloud's answer to a sample of the spool. It says something about ε where the same bundle still serves."""
        runtime = self.runtime
        labels = runtime.task.labels
        if sample.bundle_id != runtime.bundle_id or receipt.label_id >= len(labels) or labels[receipt.label_id] != receipt.label:
            return
        self.drift.answered_by(receipt.teacher_id, receipt.prompt_id)
        small = -1
        if sample.purpose == cloud_pb2.EXPLORE and sample.HasField("small"):
            small = int(scores_from_proto(sample.small, runtime.task.label_space, len(labels)).argmax())
        self.drift.replied(sample.sample_id, receipt.label_id, small=small)

    def swap(self, runtime: EdgeRuntime) -> None:
        """Serve `runtime` from the next request on. Another calibration begins its estimates anew."""
        same = (runtime.bundle_id, runtime.calibration) == (self.runtime.bundle_id, self.runtime.calibration)
        self._serving = Serving(runtime, self.drift if same else _drift(runtime))

    async def close(self) -> None:
        """Keep what is explored and not yet in the spool."""
        if self._explorer is not None:
            await self._explorer.close()

    def _note(self, decisions: Sequence[Decision], serving: Serving) -> None:
        """What the policy did, for the estimates; and the share of what stays that is sent up all the same."""
        runtime, drift = serving
        share = self._explorer.share if self._explorer is not None else 0.0
        for decision in decisions:
            if decision.sample.route is not Route.AUTO:
                continue
            answer = decision.answer
            tensors = isinstance(decision.sample.payload, Tensors)
            explored = decision.local and share > 0 and not tensors and explores(answer.sample_id, share)
            drift.decided(answer.sample_id, answer.label_id, decision.score, local=decision.local, explored=explored)
            if explored and self._explorer is not None:
                message = to_predict(decision, runtime, purpose=Purpose.EXPLORE, p_escalate=share)
                self._explorer.keep(
                    Waiting(sample=message, task_id=runtime.task.id, label_space=runtime.task.label_space, reason="explored")
                )

    async def _escalate(self, serving: Serving, decisions: Sequence[Decision], budget_s: float | None) -> list[Answer]:
        """The cloud's answers, in order; of tensors, which no large model reads, the small model's."""
        unreadable = [isinstance(decision.sample.payload, Tensors) for decision in decisions]
        if self._client is None:
            return [degraded(d.answer, _TENSORS if stuck else NO_CLOUD) for d, stuck in zip(decisions, unreadable, strict=True)]
        if any(unreadable):
            readable = [decision for decision, stuck in zip(decisions, unreadable, strict=True) if not stuck]
            rest = iter(await self._escalate(serving, readable, budget_s) if readable else ())
            return [degraded(d.answer, _TENSORS) if stuck else next(rest) for d, stuck in zip(decisions, unreadable, strict=True)]
        runtime, drift = serving
        task, gate = runtime.task, runtime.calibration.hint
        messages = [
            to_predict(
                decision, runtime, purpose=Purpose.LIVE, p_escalate=1.0, hint=gate_hint(decision.hint, gate, decision.answer.sample_id)
            )
            for decision in decisions
        ]
        timeout_s = self._deadline_s if budget_s is None else min(self._deadline_s, max(0.001, budget_s - _MARGIN_S))
        outcomes = await self._client.predict(
            messages, task_id=task.id, label_space=task.label_space, labels=task.labels, timeout_s=timeout_s
        )
        answers: list[Answer] = []
        keep: list[Waiting] = []
        for decision, message, outcome in zip(decisions, messages, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                answers.append(cloud_answer(decision, outcome, task.labels))
                drift.answered_by(outcome.teacher_id, outcome.prompt_id)
                drift.replied(decision.answer.sample_id, outcome.label_id)
                if outcome.stored:
                    continue
                reason, dead = "the cloud could not store it", False
            else:
                answers.append(degraded(decision.answer, outcome.reason))
                reason, dead = outcome.reason, isinstance(outcome, Failure) and outcome.kind is Kind.INVALID
            keep.append(Waiting(sample=message, task_id=task.id, label_space=task.label_space, reason=reason, dead=dead))
        return await self._kept(answers, keep)

    async def _kept(self, answers: list[Answer], keep: Sequence[Waiting]) -> list[Answer]:
        """`answers`, once the spool has committed `keep`; what it could not keep is said in the answer's reason."""
        if self._spool is None or not keep:
            return answers
        lost: dict[str, str] = {}
        try:
            lost = dict.fromkeys(await self._spool.put(keep), "not kept: the spool is full")
        except StoreError as error:
            # A full or broken disk must not be an outage.
            self._stats.spool_errors += len(keep)
            self._alarm("spool", f"spool: {error}")
            lost = {row.sample.sample_id: "not kept: the spool can't be written" for row in keep}
        if not lost:
            return answers
        return [
            degraded(answer, f"{answer.reason}; {lost[answer.sample_id]}")
            if answer.source is Source.DEGRADED and answer.sample_id in lost
            else answer
            for answer in answers
        ]


def _begun(serving: Serving, decisions: list[Decision], started: float) -> Begun:
    return Begun(serving, decisions, [decision for decision in decisions if not decision.local], started)


def _follow(answers: asyncio.Future[list[Answer]], task: asyncio.Future[list[Answer]]) -> None:
    """`answers` ends as `task` does; whoever cancels `answers` cancels the task."""

    def ended(done: asyncio.Future[list[Answer]]) -> None:
        if done.cancelled():
            answers.cancel()
        elif (error := done.exception()) is not None and not answers.done():
            answers.set_exception(error)
        elif not answers.done():
            answers.set_result(done.result())

    task.add_done_callback(ended)
    answers.add_done_callback(lambda given_up: task.cancel() if given_up.cancelled() else None)


def _drift(runtime: EdgeRuntime) -> Drift:
    def alarm(sentence: str) -> None:
        log.error("drift: %s", sentence)

    return Drift(runtime.calibration, alarm)
