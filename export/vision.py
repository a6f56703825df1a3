"""Image classifiers as ONNX graphs, `image` uint8 [B, S, S, 3] → `logits` [B, C]: a trace of our nets, or the user's own graph.

TensorRT takes uint8 as a network's input alone, and nothing but Cast reads it: so the cast comes first, and no node stands before it.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from export.fixed import wrapped
from export.nodes import Nodes
from export.trace import traced
from kcm.task import PreprocessSpec
from training.fixed import FixedGraph
from training.fixed_images import layout_of
from training.vision.kind import VisionModel

INPUT = "image"


def traced_images(module: nn.Module, size: int) -> onnx.ModelProto:
    """The graph of a module from `image` uint8 [B, size, size, 3] to `logits` [B, C], BatchNorms folded into the convolutions."""
    return traced(module, {INPUT: torch.zeros((2, size, size, 3), dtype=torch.uint8)}, free=1)


def vision_graph(small: VisionModel) -> onnx.ModelProto:
    """One of our nets, from our input to `logits`."""
    return wrapped(traced_images(small.module(), small.size), "logits", [_input(small.size)], lambda nodes, value: INPUT, small.classes)


def fixed_image_graph(small: FixedGraph, spec: PreprocessSpec) -> onnx.ModelProto:
    """The user's graph from our input to `logits`: floats get (x − mean) / std in front, pixels go in as they are.

    Raises:
        ConfigError: it reads other inputs, or has an opset below 18 and can't be converted.
    """

    def feed(nodes: Nodes, value: onnx.ValueInfoProto) -> str:
        tensor = value.type.tensor_type
        shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in tensor.shape.dim]
        kind = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        layout = layout_of(kind, shape, spec.size, "the small model's graph")
        if layout == "pixels":
            return INPUT
        x = nodes("Cast", INPUT, to=TensorProto.FLOAT)
        x = nodes("Div", nodes("Sub", x, np.array(spec.mean, np.float32)), np.array(spec.std, np.float32))
        x = nodes("Transpose", x, perm=[0, 3, 1, 2]) if layout == "channels-first" else x
        return str(nodes("Cast", x, out=value.name, to=tensor.elem_type))

    model = onnx.load_model_from_string(small.model)
    return wrapped(model, small.logits, [_input(spec.size)], feed, small.classes)


def _input(size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["B", size, size, 3])
