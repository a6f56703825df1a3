"""A small model's graph in fp16: weights, embeddings and products half as wide, what could overflow or lose its digits as it was."""

from __future__ import annotations

import onnx

# Sums over a text, norms and squares: 65504 is soon reached, and small terms vanish beside large ones. What holds a scale stays fp32.
WIDE = ("LayerNormalization", "Pow", "QuantizeLinear", "DequantizeLinear", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt")


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with fp16 inside; inputs and outputs keep their types. `model` is changed.

    By onnxruntime.transformers.float16, which comes with the onnxruntime wheel.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    made = convert_float_to_float16(model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *WIDE])
    # The converter appends its casts at the end of the list.
    ordered = ONNXModel(made)
    ordered.topological_sort()
    result: onnx.ModelProto = ordered.model
    return result
