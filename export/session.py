"""ONNX Runtime as export uses it: one thread, CPU, outputs by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import require


class Session:
    """A graph from bytes: external data can't be reached from there."""

    def __init__(self, model: bytes) -> None:
        ort = require("onnxruntime", "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
        return dict(zip(self._names, self._session.run(None, inputs), strict=True))
