"""A run's fused graph in each precision: fp32, fp16 and int8 of the same weights."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from export.graph import fuse_judge, fuse_ngrams, judge_precision
from export.half import half
from export.quantise import Feed, quantised
from kcm.bundle import Precision
from kcm.preprocess import Preprocessor, load_preprocessor
from training.encoder import EncoderHead
from training.ngrams import NgramModel
from training.run import Run
from training.vision.kind import VisionModel

if TYPE_CHECKING:
    import onnx

    from export.fixed import Counts

CALIBRATION = 256  # samples that give int8 its ranges


class Graphs:
    """The fused graph of one run by precision; an encoder or an image net is traced once for all of them.

    int8 takes its ranges from CALIBRATION samples of the run, evenly spread over those that it was fitted on: the labelled ones and those
    of the stream that the large model answered. No labels are read, and none of the samples that ε or the test stand on.
    """

    def __init__(self, run: Run, candidates: int) -> None:
        self._run, self._candidates = run, candidates
        self._classes = len(run.task.labels)

    def fuse(self, precision: Precision) -> bytes:
        """Serialised; small model and judge in one graph with the bundle's five outputs.

        Raises:
            ConfigError: the user's own graph has an opset below 18 and can't be converted.
        """
        small, router = self._run.small, self._run.router
        if isinstance(small, NgramModel):
            return bytes(fuse_ngrams(small, router, self._candidates, precision).SerializeToString())
        from export.fixed import append_to

        bare, counts = self._bare
        model = type(bare)()
        model.CopyFrom(bare)
        if precision == "fp16":
            model = half(model)
        elif precision == "int8":
            model = quantised(model, self._feeds())
        return append_to(model, counts, router, self._classes, self._candidates, judge_precision(precision))

    def judge(self, precision: Precision) -> bytes:
        """The judge alone, on given logits."""
        return bytes(fuse_judge(self._run.router, self._candidates, self._classes, precision).SerializeToString())

    @cached_property
    def _bare(self) -> tuple[onnx.ModelProto, Counts | None]:
        """The small model from our inputs to its logits, and what adds length and unknown share, which images have not."""
        small, spec = self._run.small, self._run.task.preprocess
        if spec.kind == "image":
            from export.vision import fixed_image_graph, vision_graph

            return vision_graph(small) if isinstance(small, VisionModel) else fixed_image_graph(small, spec), None
        if isinstance(small, EncoderHead):
            from export.encoder import encoder_counts, encoder_graph

            return encoder_graph(small), encoder_counts(small)
        from export.fixed import fixed_counts, fixed_graph

        return fixed_graph(small), fixed_counts(small)

    def _feeds(self) -> list[Feed]:
        payloads = self._run.payloads
        chosen = np.unique(np.linspace(0, len(payloads) - 1, min(CALIBRATION, len(payloads))).astype(int))
        preprocessor = preprocessor_of(self._run)
        return [preprocessor.batch([payloads[i]]) for i in chosen]


def preprocessor_of(run: Run) -> Preprocessor:
    """What the device makes of a sample, from the run alone."""
    tokenizer = tokenizer_json(run)
    return load_preprocessor(run.task.preprocess, {"tokenizer.json": tokenizer} if tokenizer else {})


def tokenizer_json(run: Run) -> bytes:
    """What the device's tokenizer reads; empty for n-grams and images, which need no file."""
    return b"" if isinstance(run.small, (NgramModel, VisionModel)) else bytes(run.small.tokenizer_json)
