"""An encoder that reads a hint as a prior over its labels, as that of a text → image retrieval task does."""

from __future__ import annotations

from pathlib import Path

import cloud_kit
import numpy as np

from cloud_server.models import load_large
from kcm.fusion import fuse, fusion_id, log_prior
from kcm.sample import Hint


def test_a_hint_is_a_prior_where_it_has_a_weight(tmp_path: Path) -> None:
    plain = load_large(cloud_kit.tiny_encoder(tmp_path / "plain"))
    hinted = load_large(cloud_kit.tiny_encoder(tmp_path / "hinted", hint_weight=0.6, temperature=0.5))
    assert not plain.reads_hints and hinted.reads_hints
    assert hinted.prompt_id == fusion_id(temperature=0.5, weight=0.6) != fusion_id(temperature=0.4, weight=0.6)
    texts, hints = list(cloud_kit.TEXTS[:3]), [None, Hint(label_ids=(2,), probabilities=(0.9,), confidence=0.9), cloud_kit.HINT]
    scores = plain.logits(texts, [None] * 3)  # at temperature 1
    expected = fuse(scores, log_prior(hints, len(plain.labels)), temperature=0.5, weight=0.6)
    np.testing.assert_allclose(hinted.logits(texts, hints), expected, atol=1e-5)
    assert np.abs(hinted.logits(texts, [None] * 3) - expected)[1:].max() > 0.5, "the hint must count, else this proves nothing"
