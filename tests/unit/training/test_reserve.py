"""The tenth that is never distilled, and what it is for: a call rate that comes true on traffic after a round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_kit import sentences

from kcm.app.samples import fresh_payloads
from kcm.policy import epsilon_for_rate
from kcm.task import load_task
from training.data import load_split
from training.program import distil_run
from training.reserve import reserved
from training.run import Run
from training.small import Ngrams


def test_a_tenth_is_reserved_and_always_the_same() -> None:
    texts = [f"text {i}" for i in range(5000)]
    share = np.mean([reserved(text) for text in texts])
    assert 0.085 < share < 0.115
    assert [text for text in texts[:60] if reserved(text)] == [text for text in texts[:60] if reserved(text)] != []


def test_after_a_round_a_rate_is_read_off_the_reserve_alone(tiny_run: Run, tiny_task: Path) -> None:
    """The hard half of the stream was distilled: what is left of it, but for the reserve, is easy."""
    task = load_task(tiny_task)
    kind = Ngrams(task, None)
    stream = load_split(task, "stream").payloads
    assert fresh_payloads(tiny_run) == [text for text in stream if text not in set(tiny_run.payloads)]
    confidence = tiny_run.judge.confidence(kind.predict(tiny_run.small, kind.featurise(stream)))
    hard = confidence <= epsilon_for_rate(confidence, 0.5)
    taught = [text for text, is_hard in zip(stream, hard, strict=True) if is_hard and not reserved(text)]
    answers = dict(sentences(400, 2))
    logits = 5 * np.eye(len(task.labels), dtype=np.float32)[[task.labels.index(answers[text]) for text in taught]]
    new = distil_run(
        tiny_run,
        kind,
        load_split(task, "train"),
        None,
        taught,
        logits,
        parent="",
        teacher_id="t",
        gauge=None,
        seed=0,
        progress=lambda _: None,
    )
    fresh = fresh_payloads(replace(new))
    assert fresh == [text for text in stream if reserved(text)]
    assert {bool(is_hard) for text, is_hard in zip(stream, hard, strict=True) if text in set(fresh)} == {True, False}
