"""A frozen encoder with its head as one ONNX graph: traced by torch, then fused with the judge like any graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.fixed import TOKEN_INPUTS, Counts, adapted, append_to, token_counts
from export.graph import OPSET
from training.encoder import EncoderHead, Pooled
from training.select import Router
from training.tokens import unknown_id


class _Logits(nn.Module):
    """input_ids, attention_mask int64 [B, L] → logits [B, C]."""

    def __init__(self, small: EncoderHead) -> None:
        super().__init__()
        self.pooled = Pooled(small.folder)
        self.head = nn.Linear(*small.weight.shape)
        self.head.load_state_dict({"weight": torch.from_numpy(small.weight.T.copy()), "bias": torch.from_numpy(small.bias)})
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pooled(input_ids, attention_mask))
        return logits


def fuse_encoder(small: EncoderHead, router: Router, candidates: int) -> bytes:
    """input_ids, attention_mask int64 [B, L] → logits, top_ids, top_probs, confidence, score; serialised."""
    return append_to(encoder_graph(small), encoder_counts(small), router, len(small.bias), candidates)


def encoder_graph(small: EncoderHead) -> onnx.ModelProto:
    """The encoder with its head, from our inputs to `logits`."""
    return adapted(trace(_Logits(small)), "logits", TOKEN_INPUTS, len(small.bias))


def encoder_counts(small: EncoderHead) -> Counts:
    return token_counts(unknown_id(small.tokenizer_json))


def trace(module: nn.Module) -> onnx.ModelProto:
    """The module's ONNX graph with dynamic B and L, stripped of what torch notes of this machine (stack traces hold paths)."""
    ids = torch.zeros((2, 5), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.inference_mode(), _quiet():
        program: Any = torch.onnx.export(
            module,
            (ids, mask),
            input_names=list(TOKEN_INPUTS),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(TOKEN_INPUTS, dynamic),
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
