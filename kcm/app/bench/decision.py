"""A decision in process beside one bare session.run of the same graph on the same inputs, and the preprocessing alone."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

from edge_runtime import EdgeRuntime
from kcm.app.bench.clocks import in_turn
from kcm.app.bench.judge_graphs import session_of
from kcm.app.bench.payloads import SENTENCE, payloads, photo
from kcm.bundle import Bundle
from kcm.preprocess import load_preprocessor
from kcm.sample import Route, Sample, Tensors

_CALLS = 600
_SLOW_CALLS = 50
_SECONDS = 0.3  # of one kind of call: a large graph's are fewer


class Decisions:
    """Everything that is measured in this process at batch 1."""

    def __init__(self, bundle: Bundle) -> None:
        edge, bare = EdgeRuntime.from_bundle(bundle), session_of(bundle.model("fp32"))
        warm, cold = (load_preprocessor(bundle.task.preprocess, bundle.files) for _ in range(2))
        modality, (payload,) = bundle.task.modality, payloads(bundle, 1)
        inputs = warm.batch([payload])
        # LOCAL: the policy is asked, and answers alike whatever ε the bundle has.
        given = [Sample(payload=payload, sample_id="a", route=Route.LOCAL)]
        tensors = [Sample(payload=Tensors({name: array[0] for name, array in inputs.items()}), sample_id="a", route=Route.LOCAL)]
        self._calls: dict[str, Callable[[], object]] = {
            "run": lambda: bare.run(None, inputs),
            "decision": lambda: edge.infer(tensors),
            f"{modality}_decision": lambda: edge.infer(given),
            "preprocess": lambda: warm.batch([payload]),
        }
        self._slow: dict[str, Callable[[], object]] = {}
        if modality == "image":
            picture = photo()
            self._slow["photo_decision"] = lambda: edge.infer([Sample(payload=picture, sample_id="a", route=Route.LOCAL)])
            self._slow["preprocess_photo"] = lambda: warm.batch([picture])
        else:
            self._slow["preprocess_cold"] = lambda: cold.batch([next(self._unseen)])
        if bundle.task.preprocess.kind == "ngrams":
            peer = _hashing()
            self._slow["sklearn"] = lambda: peer.transform([SENTENCE])
        self._draw, self._unseen = random.Random(0), iter([""])
        self.run_s = in_turn({"run": self._calls["run"]}, _SLOW_CALLS)["run"] / 1e6
        self._share = min(1.0, _SECONDS / _CALLS / self.run_s)

    def measure(self) -> dict[str, float]:
        """CPU µs per call."""
        self._unseen = self._sentences(_SLOW_CALLS)
        return in_turn(self._calls, int(_CALLS * self._share)) | in_turn(self._slow, int(_SLOW_CALLS * self._share))

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
