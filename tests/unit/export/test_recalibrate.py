"""ε of another precision: the same calls, accuracy or promise on its own scores; and what the run must keep for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_kit import sentences

from export.precisions import Graphs, preprocessor_of
from export.recalibrate import ROWS, basis, recalibrated
from export.session import Session
from kcm.calibration import Guarantee, Threshold
from kcm.errors import DataError
from kcm.policy import epsilon_for_rate
from training.calibrate import for_rate, reference
from training.ngrams import NgramModel
from training.run import ANSWERED, Answered, Run, load_run, save_calibrated, save_run

FRESH = [text for text, _ in sentences(400, seed=91)]
ROWS_KEPT = sentences(300, seed=92)


def changed(run: Run, factor: float) -> Run:
    """The run with the small model's logits times `factor`: what a coarse precision might do to scores."""
    arrays = {name: tensor.numpy().copy() for name, tensor in run.small.state_dict().items()}
    arrays["table"] *= factor
    return replace(run, small=NgramModel(arrays))


def sessions(run: Run, factor: float = 0.6) -> tuple[Session, Session, Session]:
    """fp32 of the run; a graph with other scores; its judge."""
    plain, other = Graphs(run, 3), Graphs(changed(run, factor), 3)
    return Session(plain.fuse("fp32")), Session(other.fuse("fp32")), Session(other.judge("fp32"))


def again(run: Run, fresh: list[str], factor: float = 0.6) -> Threshold:
    plain, other, judge = sessions(run, factor)
    return recalibrated(run, basis(run, plain, preprocessor_of(run), fresh), other, judge)


def told(run: Run, *, fooled: float = 0.02) -> Answered:
    """A large model that is nearly always right."""
    labels = np.array([run.task.labels.index(label) for _, label in ROWS_KEPT])
    large = labels.copy()
    large[: int(fooled * len(large))] = (large[: int(fooled * len(large))] + 1) % len(run.task.labels)
    return Answered([text for text, _ in ROWS_KEPT], labels, large)


def test_a_rate_is_kept_on_the_same_fresh_samples(tiny_run: Run) -> None:
    plain, other, _ = sessions(tiny_run)
    preprocessor = preprocessor_of(tiny_run)
    before, after = (session.answer(preprocessor, FRESH)["score"] for session in (plain, other))
    run = replace(tiny_run, threshold=for_rate(before, 0.3))
    new = again(run, FRESH)
    assert new.method == "cloud-rate" and new.target == 0.3 and new.samples == len(FRESH)
    assert new.cloud_rate == float((after <= new.epsilon).mean()) == pytest.approx(0.3, abs=0.005)
    assert abs(new.epsilon - run.threshold.epsilon) > 0.02, "the other graph's scores are elsewhere"
    assert (after <= run.threshold.epsilon).mean() > 0.4, "fp32's ε would send up far more"


def test_the_same_graph_gets_the_same_epsilon_with_and_without_fresh_payloads(tiny_run: Run) -> None:
    plain, _, _ = sessions(tiny_run)
    scores = plain.answer(preprocessor_of(tiny_run), FRESH)["score"]
    by_rate = replace(tiny_run, threshold=for_rate(scores, 0.3))
    assert again(by_rate, FRESH, 1.0).epsilon == pytest.approx(by_rate.threshold.epsilon, abs=1e-6)
    out_of_fold = replace(tiny_run, threshold=for_rate(tiny_run.score(tiny_run.out_of_fold), 0.3))
    assert again(out_of_fold, [], 1.0).epsilon == pytest.approx(out_of_fold.threshold.epsilon, abs=1e-4)


def test_without_fresh_payloads_the_rounding_of_the_same_texts_moves_the_out_of_fold_scores(tiny_run: Run) -> None:
    run = replace(tiny_run, threshold=for_rate(tiny_run.score(tiny_run.out_of_fold), 0.3))
    new = again(run, [])
    plain, other, _ = sessions(run)
    preprocessor = preprocessor_of(run)
    moved = other.answer(preprocessor, run.payloads)["logits"] - plain.answer(preprocessor, run.payloads)["logits"]
    held = replace(run.out_of_fold, logits=run.out_of_fold.logits + moved)
    assert new.epsilon == pytest.approx(epsilon_for_rate(run.score(held), run.threshold.cloud_rate or 0), abs=1e-4)
    assert abs(new.epsilon - run.threshold.epsilon) > 1e-3 and new.samples == len(run.payloads)


def test_a_fixed_epsilon_stays(tiny_run: Run) -> None:
    run = replace(tiny_run, threshold=Threshold(epsilon=0.9, method="fixed", target=0.9))
    new = again(run, FRESH)
    assert (new.epsilon, new.method) == (0.9, "fixed") and new.cloud_rate is not None and new.samples == len(FRESH)


def test_an_accuracy_and_a_promise_are_chosen_again_on_the_answers_that_the_run_keeps(tiny_run: Run) -> None:
    answered = told(tiny_run)
    plain, other, _ = sessions(tiny_run)
    kept = other.answer(preprocessor_of(tiny_run), answered.payloads)
    small, large = kept["logits"].argmax(1) == answered.labels, answered.large == answered.labels
    promise = Guarantee(max_drop=0.05, confidence=0.9, upper=0.0, effective_n=0.0, method="old")
    for threshold in (
        Threshold(epsilon=0.5, method="accuracy", target=0.95),
        Threshold(epsilon=0.5, method="guarantee", target=0.05, guarantee=promise),
    ):
        run = replace(tiny_run, threshold=threshold, answered=answered)
        new = again(run, FRESH)
        right = np.where(kept["score"] > new.epsilon, small, large)
        assert new.accuracy == right.mean() and new.samples == len(answered.payloads) and new.method == threshold.method
        assert 0 < (new.cloud_rate or 0) < 1 and new.epsilon != 0.5
        if new.guarantee is None:
            assert new.accuracy >= 0.95
        else:
            assert (new.guarantee.max_drop, new.guarantee.confidence) == (0.05, 0.9) and 0 < new.guarantee.upper <= 0.05
    del plain


def test_what_labels_do_not_support_is_refused(tiny_run: Run) -> None:
    promise = Guarantee(max_drop=0.001, confidence=0.99, upper=0.0, effective_n=0.0, method="old")
    for method, guarantee in (("guarantee", promise), ("accuracy", None)):
        threshold = Threshold(epsilon=0.5, method=method, target=1.0, guarantee=guarantee)
        with pytest.raises(DataError, match="keeps no answers") as error:
            again(replace(tiny_run, threshold=threshold), FRESH)
        assert "kcm calibrate" in error.value.fix
        with pytest.raises(DataError, match=r"can't promise|out of reach"):
            again(replace(tiny_run, threshold=threshold, answered=told(tiny_run)), FRESH)


def test_the_reference_is_of_the_precisions_own_scores(tiny_run: Run) -> None:
    plain, other, _ = sessions(tiny_run)
    preprocessor, answered = preprocessor_of(tiny_run), told(tiny_run)
    before, after = (session.answer(preprocessor, FRESH)["score"] for session in (plain, other))
    threshold = for_rate(before, 0.3)
    threshold = msgspec.structs.replace(
        threshold, reference=reference(before, threshold.epsilon), teacher_id="t", prompt_id="p", head=tiny_run.threshold.head
    )
    new = again(replace(tiny_run, threshold=threshold, answered=answered), FRESH)
    kept = other.answer(preprocessor, answered.payloads)
    agree = kept["logits"].argmax(1) == answered.large
    assert new.reference == reference(after, new.epsilon, agree, kept["score"]) and new.reference.escalated > 0
    assert (new.teacher_id, new.prompt_id, new.head, new.hint) == ("t", "p", threshold.head, threshold.hint)
    assert again(replace(tiny_run, threshold=for_rate(before, 0.3)), FRESH).reference is None


def test_many_texts_are_thinned_evenly(tiny_run: Run) -> None:
    plain, _, _ = sessions(tiny_run)
    texts = [f"refund {i}" for i in range(3 * ROWS)]
    on = basis(tiny_run, plain, preprocessor_of(tiny_run), texts)
    assert len(on.payloads) == ROWS and on.payloads[0] == texts[0] and on.payloads[-1] == texts[-1] and on.rows is None


def test_the_answers_come_back_with_the_run_and_go_with_the_next_calibration(tiny_run: Run, tmp_path: Path) -> None:
    answered = Answered(['line\u2028sep "quoted"', "東京\r\n"], np.array([0, 5]), np.array([3, 5]))
    save_run(tmp_path / "run", replace(tiny_run, answered=answered))
    back = load_run(tmp_path / "run").answered
    assert back is not None and back.payloads == answered.payloads
    assert np.array_equal(back.labels, answered.labels) and np.array_equal(back.large, answered.large)
    save_calibrated(tmp_path / "run", replace(load_run(tmp_path / "run"), answered=None))
    assert load_run(tmp_path / "run").answered is None and not (tmp_path / "run" / ANSWERED).exists()
    assert load_run(tmp_path / "run").payloads == tiny_run.payloads
