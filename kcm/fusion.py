"""An image model's way to read a hint: calibrated logit fusion. The hint is a prior over classes.

    logits' = log_softmax(logits / T) + w · log p_hint

A product of experts (Hinton 2002) in which the temperature T calibrates the large model (Guo et al. 2017) and the weight w says how
much the small model adds to what the large one knows already: 1 where both err independently given the class, 0 where it adds
nothing. Training fits both (NLL) and the cloud serves with them, by this one implementation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kcm.sample import Float32, Hint

_VERSION = 1  # part of every fusion_id: raise it when this file fuses otherwise
FLOOR = 1e-4  # of p_hint for any class: a device that says 1.0 must not rule a class out


def log_prior(hints: Sequence[Hint | None], classes: int) -> Float32:
    """log p_hint, float32 [B, C]: the probabilities of a hint's labels, the rest of the mass spread evenly over the other classes.

    An assertion is a hint of one label. Zeros where there is no hint: the fusion then changes nothing.
    """
    prior_BC = np.zeros((len(hints), classes), np.float32)
    for prior_C, hint in zip(prior_BC, hints, strict=True):
        if hint is None or not hint.label_ids:
            continue
        named = dict(zip(hint.label_ids, hint.probabilities, strict=True))
        rest = max(0.0, 1.0 - sum(named.values())) / max(1, classes - len(named))
        p_C = np.full(classes, rest, np.float64)
        p_C[list(named)] = list(named.values())
        p_C = np.maximum(p_C, FLOOR)
        prior_C[:] = np.log(p_C / p_C.sum())
    return prior_BC


def fuse(logits_BC: Float32, prior_BC: Float32, *, temperature: float, weight: float) -> Float32:
    """float32 [B, C]: log_softmax(logits / T) + w · prior; unnormalised where there is a prior.

    Args:
        prior_BC: log p_hint, as `log_prior` gives it.
    """
    scaled = logits_BC.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    log_p = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    fused: Float32 = (log_p + weight * prior_BC).astype(np.float32)
    return fused


def fusion_id(*, temperature: float, weight: float) -> str:
    """Names the fusion, as a reply's prompt_id: another weight, temperature or floor makes other answers of one hint."""
    fusion = repr((_VERSION, FLOOR, weight, temperature))
    return f"prior-{hashlib.sha256(fusion.encode()).hexdigest()[:12]}"
