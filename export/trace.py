"""A torch module as an ONNX graph, without what torch notes of this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.graph import OPSET


def traced(module: nn.Module, example: Mapping[str, Tensor], free: int) -> onnx.ModelProto:
    """The module's graph from inputs by name to `logits`, stripped of stack traces, which hold paths.

    Args:
        example: inputs in the order of the module's arguments; two rows or more, since one would be taken for fixed.
        free: how many of each input's first axes may have any size.
    """
    dynamic = dict.fromkeys(range(free), torch.export.Dim.DYNAMIC)
    with torch.inference_mode(), _quiet():
        program: Any = torch.onnx.export(
            module,
            tuple(example.values()),
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(example, dynamic),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model: onnx.ModelProto = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision, which nobody asked for, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
