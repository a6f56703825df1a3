"""The protocol between the runtime and whatever runs the fused graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kcm.bundle import GraphSpec
    from kcm.preprocess import Inputs

OUTPUTS = ("logits", "top_ids", "top_probs", "confidence", "score")


class Outputs(NamedTuple):
    """What the graph says of a batch of B samples over C labels, with k candidates."""

    logits: NDArray[np.float32]  # [B, C]
    top_ids: NDArray[np.int64]  # [B, k], best first
    top_probs: NDArray[np.float32]  # [B, k]
    confidence: NDArray[np.float32]  # [B]: C_x
    score: NDArray[np.float32]  # [B]: the routing score, above ε stays local; C_x unless calibration chose another head


class Engine(Protocol):
    """A loaded graph, used by one thread at a time. `provider` is what really runs it, as the runtime reports it."""

    provider: str

    def infer(self, inputs: Inputs) -> Outputs:
        """Outputs of the batch; they are the caller's until the next call.

        Raises:
            EngineError: the device failed; the engine is worth nothing any more.
        """
        ...

    def close(self) -> None:
        """Give back what the device holds. The engine isn't used afterwards."""
        ...


class Backend(Protocol):
    """One way to run the graph on this machine."""

    @property
    def name(self) -> str: ...

    def probe(self) -> str:
        """Why it can't run here, in words that a user can act on; empty where it can. Leaves nothing loaded on the device."""
        ...

    def ready(self, model: bytes, graph: GraphSpec) -> bool:
        """`load` needs no `prepare` first."""
        ...

    def prepare(self, model: bytes, graph: GraphSpec) -> None:
        """What takes minutes and is done once: building an engine, in a process of its own with limits.

        Raises:
            EngineError: it failed, or took too long or too much memory; the message holds the builder's own words.
        """
        ...

    def cancel(self) -> None:
        """End the `prepare` that runs in another thread: it raises EngineError."""
        ...

    def load(self, model: bytes, graph: GraphSpec, classes: int) -> Engine:
        """An engine for the verified bytes of an ONNX model of C classes.

        Raises:
            BundleError: no model, tensors outside of it, or another signature than the manifest's.
            EngineError: this machine can't run it.
        """
        ...
