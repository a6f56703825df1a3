"""ONNX Runtime as export uses it: one thread, CPU, outputs by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import require
from kcm.preprocess import Preprocessor
from kcm.sample import Payload

Outputs = dict[str, NDArray[Any]]

_BATCH = 32


class Session:
    """A graph from bytes: external data can't be reached from there."""

    def __init__(self, model: bytes) -> None:
        ort = require("onnxruntime", "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, NDArray[Any]]) -> Outputs:
        return dict(zip(self._names, self._session.run(None, inputs), strict=True))

    def answer(self, preprocessor: Preprocessor, payloads: Sequence[Payload]) -> Outputs:
        """Every output for N samples, [N, ...]; in batches of like length, so that padding stays small."""
        order = sorted(range(len(payloads)), key=lambda i: len(payloads[i]))
        batches = (order[start : start + _BATCH] for start in range(0, len(payloads), _BATCH))
        parts = [self.run(preprocessor.batch([payloads[i] for i in rows])) for rows in batches]
        back = np.argsort(order)
        return {name: np.concatenate([part[name] for part in parts])[back] for name in self._names}
