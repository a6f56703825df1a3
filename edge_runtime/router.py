"""One request's way: decide on the device, ask the cloud for the rest, keep what it could not take, answer.

Also the in-process form with a cloud: Router(runtime, client=..., spool=...).infer(samples).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_runtime.cloud_client import CloudClient, Failure, Kind, Prediction
from edge_runtime.config import EdgeConfig
from edge_runtime.runtime import NO_CLOUD, Decision, EdgeRuntime, check_samples, degraded
from edge_runtime.spool import Spool, Waiting
from edge_runtime.stats import Stats
from kcm.errors import StoreError
from kcm.logs import Alarm
from kcm.sample import Answer, Float32, Purpose, Sample, Source, payload_to_proto, scores_to_proto
from protos.kcm.v1 import cloud_pb2

log = logging.getLogger("kcm.edge.router")

_TURN = 32  # samples per turn of the event loop
_INLINE_S = 0.002  # an executor costs about 0.1 ms a call
_MARGIN_S = 0.03  # of the application's deadline: for the spool's commit and the way back


class Router:
    """Answers samples with the current runtime. Belongs to one event loop; a swap replaces `runtime` between requests."""

    def __init__(self, config: EdgeConfig, runtime: EdgeRuntime, *, client: CloudClient | None, spool: Spool | None, stats: Stats) -> None:
        self.runtime = runtime
        self._client, self._spool, self._stats = client, spool, stats
        self._deadline_s = config.cloud.deadline_ms / 1000
        self._alarm = Alarm(log)
        self._pace_s = 0.0  # of one sample on this device, smoothed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # starts with its first use

    async def infer(self, samples: Sequence[Sample], budget_s: float | None = None) -> list[Answer]:
        """Answer every sample, in order. What could not be answered by the cloud is in the spool when this returns.

        Args:
            budget_s: what is left of the caller's deadline; None: no deadline.

        Raises:
            InvalidSample: another modality, or a sample_id twice; the message names the sample's index.
            TypeError: no sequence of Sample.
        """
        started = time.perf_counter()
        check_samples(samples)
        runtime = self.runtime  # one bundle for the whole request
        decisions: list[Decision] = []
        for start in range(0, len(samples), _TURN):
            if start:
                await asyncio.sleep(0)  # small requests go in between
            decisions += await self._decide(runtime, samples[start : start + _TURN], start)
        away = [decision for decision in decisions if not decision.local]
        self._stats.answered(Source.LOCAL, time.perf_counter() - started, len(decisions) - len(away))
        if not away:
            return [decision.answer for decision in decisions]
        self._stats.escalations += len(away)
        if budget_s is not None:
            budget_s -= time.perf_counter() - started
        elsewhere = iter(await self._escalate(runtime, away, budget_s))
        elapsed = time.perf_counter() - started
        answers = [decision.answer if decision.local else next(elsewhere) for decision in decisions]
        for source in (Source.CLOUD, Source.DEGRADED):
            self._stats.answered(source, elapsed, sum(answer.source is source for answer in answers))
        return answers

    async def _decide(self, runtime: EdgeRuntime, samples: Sequence[Sample], first: int) -> list[Decision]:
        """Inline where the model is tiny; on a thread of its own where the event loop would feel it."""
        if self._pace_s * len(samples) > _INLINE_S:
            loop = asyncio.get_running_loop()
            began, decisions = await loop.run_in_executor(self._thread, lambda: (time.perf_counter(), runtime.decide(samples, first)))
        else:
            began = time.perf_counter()
            decisions = runtime.decide(samples, first)
        self._pace_s += 0.1 * ((time.perf_counter() - began) / len(samples) - self._pace_s)
        return decisions

    async def _escalate(self, runtime: EdgeRuntime, decisions: Sequence[Decision], budget_s: float | None) -> list[Answer]:
        if self._client is None:
            return [degraded(decision.answer, NO_CLOUD) for decision in decisions]
        task = runtime.task
        messages = [_message(decision, runtime) for decision in decisions]
        timeout_s = self._deadline_s if budget_s is None else min(self._deadline_s, max(0.001, budget_s - _MARGIN_S))
        outcomes = await self._client.predict(
            messages, task_id=task.id, label_space=task.label_space, labels=task.labels, timeout_s=timeout_s
        )
        answers: list[Answer] = []
        keep: list[Waiting] = []
        for decision, message, outcome in zip(decisions, messages, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                answers.append(_cloud_answer(decision, outcome, task.labels))
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


def _message(decision: Decision, runtime: EdgeRuntime) -> cloud_pb2.PredictSample:
    hint = decision.hint
    return cloud_pb2.PredictSample(
        sample_id=decision.answer.sample_id,
        purpose=int(Purpose.LIVE),  # type: ignore[arg-type]
        p_escalate=1.0,  # the policy is deterministic: no sample was drawn
        hint=None if hint is None else hint.to_proto(),
        payload=payload_to_proto(decision.sample.payload),
        small=None if hint is None else scores_to_proto(decision.logits, runtime.task.label_space),
        confidence=0.0 if hint is None else hint.confidence,
        bundle_id=runtime.bundle_id,
    )


def _cloud_answer(decision: Decision, prediction: Prediction, labels: tuple[str, ...]) -> Answer:
    small = decision.answer
    return Answer(
        sample_id=small.sample_id,
        label_id=prediction.label_id,
        label=labels[prediction.label_id],
        source=Source.CLOUD,
        confidence=small.confidence,
        candidates=_candidates(prediction.scores, len(small.candidates)),
        model_id=prediction.teacher_id,
    )


def _candidates(scores: Float32, count: int) -> tuple[tuple[int, float], ...]:
    """The best `count` of `scores` [C] with their softmax."""
    weights = np.exp(scores - scores.max())
    best = np.argsort(-scores, kind="stable")[:count]
    return tuple(zip(best.tolist(), (weights[best] / weights.sum()).tolist(), strict=True))
