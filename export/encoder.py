"""A frozen encoder with its head as one ONNX graph: traced by torch, then fused with the judge like any graph."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from export.fixed import TOKEN_INPUTS, Counts, adapted, append_to, token_counts
from export.trace import traced
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
    ids = torch.zeros((2, 5), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    model = traced(_Logits(small), dict(zip(TOKEN_INPUTS, (ids, mask), strict=True)), free=2)
    return adapted(model, "logits", TOKEN_INPUTS, len(small.bias))


def encoder_counts(small: EncoderHead) -> Counts:
    return token_counts(unknown_id(small.tokenizer_json))
