"""A distillation round's examples: labels (CE), the large model's logits (L_ls), the judge's own confidence (L_js).

Source: arXiv 2510.20278: L_ls between F_s(x) and C_l where C_l > ε, L_js between F_s(x) and C_x where C_x > ε. In the forward
direction every term is a cross-entropy, so a sample's terms add up to one soft target with one weight.
The paper's rows D, KD, MCM and KCM are settings of it (kcm.task.DistillSpec.method).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.task import DistillSpec
from training.fit import one_hot, softmax
from training.judge import Judge, Predictions
from training.small import Examples, Small

Float32 = NDArray[np.float32]

_FEWEST = 10  # labelled samples above ε_l that its accuracy must rest on
_CLIP = 10.0  # most that a row counts for by 1/p_escalate: a few explored ones mustn't outvote all others


@dataclass(frozen=True)
class Lesson:
    """Soft targets [N, C] and weights [N]; `passed` is the share of teacher rows whose max C_l > ε_l."""

    targets: Float32
    weights: Float32
    passed: float


def round_examples(
    kind: Small,
    labelled: Examples,
    out_of_fold: Predictions,
    judge: Judge,
    features: Any,
    logits: Float32,
    spec: DistillSpec,
    *,
    p_escalate: Float32 | None = None,
    seed: int | tuple[int, int] = 0,
) -> tuple[Examples, float, NDArray[np.int64]]:
    """Everything that a round learns from, the share of teacher rows above ε_l, and which of them are used.

    Args:
        labelled: the labelled samples of round 0, their targets one-hot [N, C]. Those that aren't replayed stay with weight 0: the
            judge and the next round need out-of-fold predictions for all of them.
        out_of_fold: the current small model's out-of-fold predictions for them, which `judge` reads for L_js.
        features, logits: of the M samples that the large model answered without a hint, [M, C].
        p_escalate: [M], with which probability each was sent; read where the spec weighs by importance.
        seed: draws what is replayed.
    """
    own = label_lesson(labelled.targets, out_of_fold, judge, spec)
    again = replayed(labelled.targets.argmax(1), spec.replay, seed)
    lesson = teacher_lesson(logits, spec, p_escalate)
    used = np.flatnonzero(lesson.weights > 0)
    n, m = len(labelled), len(used)
    reverse = np.zeros(n + m, bool)
    reverse[n:] = spec.direction == "reverse" and not spec.hard
    examples = Examples(
        features=kind.join(labelled.features, kind.take(features, used)),
        targets=np.concatenate([own.targets, lesson.targets[used]]),
        weights=np.concatenate([own.weights * again, lesson.weights[used]]),
        labelled=np.arange(n + m) < n,
        reverse=reverse,
    )
    return examples, lesson.passed, used


def replayed(classes: NDArray[np.int64], share: float, seed: int | tuple[int, int]) -> Float32:
    """1 for a share of the labelled rows [N], evenly over the classes, and 0 for the rest."""
    order = np.lexsort((np.random.default_rng(seed).random(len(classes)), classes))
    steps = np.floor(share * np.arange(len(classes) + 1) + 1e-9)
    out = np.zeros(len(classes), np.float32)
    out[order] = np.diff(steps)
    return out


def teacher_lesson(logits: Float32, spec: DistillSpec, p_escalate: Float32 | None = None) -> Lesson:
    """L_ls: teacher logits [N, C] → targets at the temperature, or the answers alone; rows at or below ε_l weigh nothing."""
    c_l = softmax(logits)
    keep = c_l.max(1) > (0.0 if spec.teacher_epsilon == "auto" else spec.teacher_epsilon)
    weights = np.where(keep, np.float32(spec.teacher_weight), np.float32(0.0))
    if spec.importance and p_escalate is not None and keep.any():
        weights[keep] *= importance(p_escalate[keep])
    targets = one_hot(logits.argmax(1), logits.shape[1]) if spec.hard else top_k(softmax(logits, spec.temperature), spec.top_k)
    return Lesson(targets, weights, float(keep.mean()) if len(keep) else 0.0)


def importance(p_escalate: Float32) -> Float32:
    """1/p [N], clipped, with mean 1: L_ls weighs as much as before, spread as the traffic is. A p of 0 isn't known and counts as 1.

    Source: self-normalised, truncated importance sampling (Hájek 1971; Ionides 2008).
    """
    p = np.where(p_escalate > 0, p_escalate, 1.0)
    weights = np.minimum(1 / p, _CLIP)
    scaled: Float32 = (weights / weights.mean()).astype(np.float32)
    return scaled


def top_k(probabilities: Float32, k: int) -> Float32:
    """[N, C] with all but each row's k largest entries made equal, rows still summing to one; k = 0 or k ≥ C keeps all."""
    if k == 0 or k >= probabilities.shape[1]:
        return probabilities
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return from_sparse(ids, np.take_along_axis(probabilities, ids, 1), probabilities.shape[1])


def from_sparse(ids: NDArray[np.int64], probabilities: Float32, classes: int) -> Float32:
    """Sparse teacher probabilities [N, K] of the classes `ids` [N, K], K < C → [N, C]: the missing mass evenly over the others.

    An "other" bucket: what a large model that names its best answers alone leaves unsaid.
    """
    rest = np.clip(1 - probabilities.sum(1, keepdims=True), 0, 1)
    out: Float32 = np.broadcast_to(rest / (classes - ids.shape[1]), (len(ids), classes)).astype(np.float32)
    np.put_along_axis(out, ids, probabilities, 1)
    return out


def gauged(spec: DistillSpec, logits: Float32, labels: NDArray[np.int64], small_accuracy: float) -> DistillSpec:
    """The spec with an "auto" ε_l made a number: teacher logits [N, C] and true labels [N] of samples, best ones it wasn't fitted on.

    A teacher is worth listening to where it is right at least as often as the small model is on its out-of-fold predictions;
    a weak one then teaches from its surest answers, or nothing at all (ε_l = 1).
    """
    if spec.teacher_epsilon != "auto":
        return spec
    sure = softmax(logits).max(1)
    order = np.argsort(-sure, kind="stable")
    accuracy = np.cumsum((logits.argmax(1) == labels)[order]) / np.arange(1, len(labels) + 1)
    cut = np.append(np.diff(sure[order]) < 0, True)  # a threshold can't part equal confidences
    enough = np.flatnonzero((accuracy >= small_accuracy) & cut)
    if len(enough) and enough[-1] == len(labels) - 1:
        epsilon = 0.0
    elif len(enough) and enough[-1] + 1 >= _FEWEST:
        epsilon = float((sure[order[enough[-1]]] + sure[order[enough[-1] + 1]]) / 2)
    else:
        epsilon = 1.0
    return msgspec.structs.replace(spec, teacher_epsilon=epsilon)


def label_lesson(labels: Float32, out_of_fold: Predictions, judge: Judge, spec: DistillSpec) -> Lesson:
    """CE and L_js on labelled samples: one-hot labels [N, C], with the current judge's distribution added where C_x > ε."""
    c_x = judge_distribution(judge, out_of_fold)
    sure = judge.confidence(out_of_fold) > spec.judge_epsilon
    js = np.where(sure, np.float32(spec.judge_term), np.float32(0.0))
    weights = np.float32(spec.label_weight) + js
    mixed = np.float32(spec.label_weight) * labels + js[:, None] * c_x
    safe = np.where(weights > 0, weights, np.float32(1.0))
    return Lesson((mixed / safe[:, None]).astype(np.float32), weights.astype(np.float32), float(sure.mean()) if len(sure) else 0.0)


def judge_distribution(judge: Judge, predictions: Predictions) -> Float32:
    """C_x as a distribution over classes [N, C]: each rank's probability goes to the class at that rank.

    What the judge gives to "none of the ranks" is shared among the other classes as the small model shares it.
    """
    import torch

    with torch.inference_mode():
        by_rank = judge(*predictions.tensors()).exp().numpy()  # [N, ranks + 1]
    order = np.argsort(-predictions.logits, axis=1, kind="stable")
    p = softmax(predictions.logits)
    out = np.zeros_like(p)
    np.put_along_axis(out, order[:, : judge.ranks], by_rank[:, : judge.ranks], 1)
    others = p.copy()
    np.put_along_axis(others, order[:, : judge.ranks], 0.0, 1)
    rest = others.sum(1, keepdims=True)
    if p.shape[1] > judge.ranks:
        out += by_rank[:, judge.ranks :] * np.where(rest > 0, others / np.maximum(rest, 1e-30), 0)
    distribution: Float32 = (out / out.sum(1, keepdims=True)).astype(np.float32)
    return distribution
