"""A decision in process beside one bare session.run of the same graph on the same inputs, and the preprocessing alone."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

from edge_runtime import EdgeRuntime
from kcm.app.bench.clocks import in_turn
from kcm.app.bench.judge_graphs import session_of
from kcm.bundle import Bundle
from kcm.preprocess import load_preprocessor
from kcm.sample import Route, Sample, Tensors

SENTENCE = "the bank said it would raise its lending rate by half a point to nine per cent from next monday"  # 20 words
_CALLS = 600
_SLOW_CALLS = 50


class Decisions:
    """Everything that is measured in this process at batch 1."""

    def __init__(self, bundle: Bundle) -> None:
        edge, bare = EdgeRuntime.from_bundle(bundle), session_of(bundle.model("fp32"))
        warm, cold = (load_preprocessor(bundle.task.preprocess, bundle.files) for _ in range(2))
        inputs = warm.batch([SENTENCE])
        # LOCAL: the policy is asked, and answers alike whatever ε the bundle has.
        text = [Sample(payload=SENTENCE, sample_id="a", route=Route.LOCAL)]
        tensors = [Sample(payload=Tensors({name: array[0] for name, array in inputs.items()}), sample_id="a", route=Route.LOCAL)]
        self._calls: dict[str, Callable[[], object]] = {
            "run": lambda: bare.run(None, inputs),
            "decision": lambda: edge.infer(tensors),
            "text_decision": lambda: edge.infer(text),
            "preprocess": lambda: warm.batch([SENTENCE]),
        }
        self._slow: dict[str, Callable[[], object]] = {"preprocess_cold": lambda: cold.batch([next(self._unseen)])}
        if bundle.task.preprocess.kind == "ngrams":
            peer = _hashing()
            self._slow["sklearn"] = lambda: peer.transform([SENTENCE])
        self._draw, self._unseen = random.Random(0), iter([""])

    def measure(self) -> dict[str, float]:
        """CPU µs per call."""
        self._unseen = self._sentences(_SLOW_CALLS)
        return in_turn(self._calls, _CALLS) | in_turn(self._slow, _SLOW_CALLS)

    def _sentences(self, count: int) -> Iterator[str]:
        """The sentence in another alphabet each time: words of the same lengths that no cache holds."""
        alphabets = (str.maketrans(string.ascii_lowercase, "".join(self._draw.sample(string.ascii_lowercase, 26))) for _ in range(count))
        return iter([SENTENCE.translate(alphabet) for alphabet in alphabets])


def _hashing() -> Any:
    """The same words and n-grams by scikit-learn."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.pipeline import make_union

    return make_union(
        HashingVectorizer(ngram_range=(1, 2), n_features=2**18, norm=None),
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=2**18, norm=None),
    )
