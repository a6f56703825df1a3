"""A transformers encoder with a trained linear head: sentence embedding [D] → logits [C]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as hf_logging

from cloud_server.models import LargeFile
from cloud_server.prompt import Prompt
from kcm.errors import ConfigError
from kcm.fusion import fuse, fusion_id, log_prior
from kcm.preprocess import as_text
from kcm.sample import Float32, Hint, Payload
from protos.kcm.v1 import sample_pb2

_BATCH_TOKENS = 1024  # padded tokens of one forward pass: on one thread, more cost more CPU a document (caches), fewer too
HEAD_FILE = "head.safetensors"


class Encoder:
    """Texts → unit vectors: the mean of the last hidden states over real tokens (Reimers & Gurevych 2019), normalised."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """`folder` is a Hugging Face folder with safetensors and a fast tokenizer.

        Raises:
            ConfigError: transformers can't load it.
        """
        hf_logging.disable_progress_bar()  # its bars would break the log's JSON lines
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} can't be loaded as an encoder: {error}") from error
        self._model = model.eval()
        self._max_tokens = max_tokens
        self.dimension: int = model.config.hidden_size

    def embed(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> Float32:
        """float32 [B, D], each row of length 1.

        Args:
            pairs: a second segment for each text, or None for those without; on truncation the longer of both is cut.
        """
        encoded = self._encode(texts, pairs if pairs is not None else [None] * len(texts))
        out = np.empty((len(texts), self.dimension), np.float32)
        lengths = [len(e["input_ids"]) for e in encoded]
        with torch.inference_mode():
            for rows in _batches(lengths):
                inputs = self._tokenizer.pad([encoded[row] for row in rows], return_tensors="pt")
                hidden_BLD = self._model(**inputs).last_hidden_state
                mask_BL1 = inputs["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
                mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1.0)
                out[rows] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
        return out

    def _encode(self, texts: Sequence[str], pairs: Sequence[str | None]) -> list[dict[str, list[int]]]:
        """Token ids of each text, unpadded. Singles and pairs go through the tokenizer as two batches."""
        encoded: list[dict[str, list[int]]] = [{}] * len(texts)
        for paired in (False, True):
            rows = [row for row, pair in enumerate(pairs) if (pair is not None) is paired]
            if not rows:
                continue
            second = [pairs[row] for row in rows] if paired else None
            batch = self._tokenizer([texts[row] for row in rows], second, truncation="longest_first", max_length=self._max_tokens)
            for place, row in enumerate(rows):
                encoded[row] = {name: values[place] for name, values in batch.items()}
        return encoded


class EncoderModel:
    """Encoder + head. Reads a hint as a second segment where its head was fitted with hint dropout, as a prior over the labels where
    large.json gives that a weight (kcm/fusion.py), and else withholds it.
    """

    def __init__(self, folder: Path, large: LargeFile) -> None:
        """Raises ConfigError where the head is missing, or doesn't fit the labels or the encoder."""
        self._encoder = Encoder(large.weights(folder), large.max_tokens)
        self._weight_DC, self._bias_C = _read_head(folder / HEAD_FILE, self._encoder.dimension, len(large.labels))
        self._temperature = large.temperature
        self._prompt = Prompt(large.prompt, large.labels)
        self.labels = large.labels
        self._weight = large.hint_weight
        self._in_text = large.hint_dropout > 0.0 and not self._weight
        self.reads_hints = self._in_text or self._weight > 0.0
        self.teacher_id = f"encoder-{large.large_id}"
        self.prompt_id = self._prompt.prompt_id if self._in_text else "none"
        if self._weight:
            self.prompt_id = fusion_id(temperature=large.temperature, weight=self._weight)
        self.scores_kind = sample_pb2.Scores.LOGIT

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C]: (weight @ embedding + bias) / temperature; with a hint's weight its log_softmax + w · log p_hint."""
        pairs = [self._prompt.hint(hint).strip() or None for hint in hints] if self._in_text else None
        vectors = self._encoder.embed([as_text(sample) for sample in samples], pairs)
        scores: Float32 = vectors @ self._weight_DC + self._bias_C
        if self._weight:
            return fuse(scores, log_prior(hints, len(self.labels)), temperature=self._temperature, weight=self._weight)
        return scores / np.float32(self._temperature)


def _read_head(path: Path, dimension: int, classes: int) -> tuple[Float32, Float32]:
    """(weight transposed [D, C], bias [C]), both float32."""
    try:
        tensors = safetensors.torch.load_file(str(path))
        weight, bias = tensors["weight"].float(), tensors["bias"].float()
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} can't be read as a head (weight [C, D], bias [C]): {error}") from error
    if tuple(weight.shape) != (classes, dimension) or tuple(bias.shape) != (classes,):
        raise ConfigError(
            f"{path}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} don't fit {classes} labels and embeddings of {dimension}"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ConfigError(f"{path} holds values that are not finite")
    return np.ascontiguousarray(weight.numpy().T), bias.numpy()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, each at most _BATCH_TOKENS when padded (or one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r], reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
