"""A list of ONNX nodes and constants that grows by calls: `y = nodes("Mul", x, 2.0)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class Nodes:
    """Calling it appends a node and returns its output's name. Arrays and numbers become initializers (floats: float32)."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, kind: str, *inputs: str | float | NDArray[Any], out: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """The output's name, or a tuple of names for `outputs` > 1."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        made = (
            [out or f"{self._prefix}{kind.lower()}_{len(self.nodes)}"]
            if outputs == 1
            else [f"{self._prefix}{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        )
        self.nodes.append(helper.make_node(kind, names, made, name=made[0], **attributes))
        return made[0] if outputs == 1 else tuple(made)

    def constant(self, value: float | NDArray[Any]) -> str:
        """The initializer's name; equal constants share one."""
        array = np.asarray(value, np.float32) if isinstance(value, float) else np.asarray(value)
        key = (str(array.dtype), array.shape, array.tobytes() if array.size < 64 else str(len(self.initializers)).encode())
        if key not in self._constants:
            self._constants[key] = f"{self._prefix}c{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), self._constants[key]))
        return self._constants[key]
