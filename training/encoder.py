"""A small model from a Hugging Face encoder: frozen, its mean-pooled unit-length embedding into a linear head.

Frozen, so an embedding means the same whichever fold's head reads it: each text goes through the encoder once.
Source: mean over real tokens as sentence embedding (Reimers & Gurevych 2019).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.assets import MODELS, model_path
from kcm.errors import ConfigError, require
from kcm.sample import Payload
from kcm.task import Task
from training.judge import Predictions
from training.linear import fit_softmax
from training.small import Examples
from training.tokens import like_length, load_tokenizer, token_counts, unknown_id, vocabulary_size

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

_L2 = 1 / 30  # as of the large encoder's head (training/large_head.py), whose embeddings are of the same kind
_CHARACTERS = 5  # of a token, roughly: sizes batches, nothing else
_HEAD_FILE = "small.safetensors"


@dataclass(frozen=True)
class Embedded:
    """N texts: unit vectors [N, D], length [N] in tokens, unknown [N] share of them."""

    vectors: Float32
    length: Float32
    unknown: Float32

    def take(self, index: Index) -> Embedded:
        return Embedded(self.vectors[index], self.length[index], self.unknown[index])


@dataclass(frozen=True)
class EncoderHead:
    """The fitted part, weight [D, C] and bias [C], and which encoder it stands on: its folder and the hash of what lies there."""

    weight: Float32
    bias: Float32
    folder: Path
    sha256: str
    tokenizer_json: bytes

    def save(self, run: Path) -> None:
        """The head alone: the encoder stays where it is, and `load` checks that it is still the same."""
        from safetensors.numpy import save_file

        save_file({"weight": self.weight, "bias": self.bias}, run / _HEAD_FILE, metadata={"encoder_sha256": self.sha256})

    @staticmethod
    def load(run: Path, task: Task) -> EncoderHead:
        """Raises ConfigError where the head can't be read, or the encoder is gone or has changed since."""
        import safetensors

        try:
            with safetensors.safe_open(run / _HEAD_FILE, framework="numpy") as file:
                wanted = (file.metadata() or {}).get("encoder_sha256", "")
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{run / _HEAD_FILE} can't be read as an encoder's head: {error}") from error
        folder = encoder_folder(task)
        found = content_hash(folder)
        if found != wanted:
            raise ConfigError(
                f"the encoder in {folder} is not the one that {run} was trained on (sha256 {found[:12]}, the run says {wanted[:12]})",
                fix="bring the old encoder back, or: kcm train   makes a run with this one",
            )
        return EncoderHead(weight, bias, folder, found, (folder / "tokenizer.json").read_bytes())


class Pooled(nn.Module):
    """input_ids, attention_mask int64 [B, L] → unit vectors [B, D]."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where transformers can't load `folder` whole."""
        super().__init__()
        transformers = require("transformers", "train")
        safetensors = require("safetensors", "train")
        transformers.utils.logging.disable_progress_bar()
        try:
            # Eager attention: plain MatMul and Softmax, in the exported graph as well.
            encoder, report = transformers.AutoModel.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{folder} can't be loaded as an encoder: {error}") from error
        # transformers fills what is missing with random weights; a pooler isn't used here.
        if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
            raise ConfigError(f"{folder}: its safetensors lack {len(missing)} of the encoder's weights, {missing[0]} among them")
        self.encoder: Any = encoder
        self.dimension: int = encoder.config.hidden_size
        self.vocabulary: int = encoder.config.vocab_size
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BLD: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLD.dtype)
        mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1.0)
        return nn.functional.normalize(mean_BD, dim=-1)


class Encoder:
    """The kind of small model (training/small.py). Only the head is ever fitted."""

    def __init__(self, task: Task) -> None:
        """Raises ConfigError where the folder, its tokenizer.json or its weights are missing or don't fit the task."""
        self.folder, self._spec = encoder_folder(task), task.preprocess
        self.tokenizer_json, self.preprocessor = load_tokenizer(self.folder / "tokenizer.json", self._spec)
        self.sha256 = content_hash(self.folder)
        self._pooled = Pooled(self.folder)
        self._unknown = unknown_id(self.tokenizer_json)
        self._try_longest()

    def featurise(self, payloads: Sequence[Payload]) -> Embedded:
        out = Embedded(np.zeros((len(payloads), self._pooled.dimension), np.float32), *np.zeros((2, len(payloads)), np.float32))
        for rows in like_length(payloads, _CHARACTERS * self._spec.max_tokens):
            inputs = self.preprocessor.batch([payloads[row] for row in rows])
            with torch.inference_mode():
                out.vectors[rows] = self._pooled(*(torch.from_numpy(inputs[name]) for name in self.preprocessor.names)).numpy()
            out.length[rows], out.unknown[rows] = token_counts(inputs, self._unknown)
        return out

    def take(self, features: Embedded, index: Index) -> Embedded:
        return features.take(index)

    def join(self, first: Embedded, second: Embedded) -> Embedded:
        return Embedded(*(np.concatenate([getattr(f, name) for f in (first, second)]) for name in ("vectors", "length", "unknown")))

    def fit(self, examples: Examples) -> EncoderHead:
        vectors = examples.features.vectors
        dense = np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], 1)  # the last column's row of W is the bias
        _, weight = fit_softmax(None, dense, examples.targets, examples.weights, reverse=examples.reverse, l2=_L2)
        return EncoderHead(weight[:-1].copy(), weight[-1].copy(), self.folder, self.sha256, self.tokenizer_json)

    def predict(self, model: EncoderHead, features: Embedded) -> Predictions:
        return Predictions(features.vectors @ model.weight + model.bias, features.length, features.unknown)

    def _try_longest(self) -> None:
        """Run the longest text once: positions run out at some length, and a foreign vocabulary reads past the table."""
        vocabulary, longest = vocabulary_size(self.tokenizer_json), self._spec.max_tokens
        if vocabulary > self._pooled.vocabulary:
            raise ConfigError(f"{self.folder}: tokenizer.json has {vocabulary} tokens, the encoder {self._pooled.vocabulary}")
        ids = torch.zeros((1, longest), dtype=torch.int64)
        try:
            with torch.inference_mode():
                self._pooled(ids, torch.ones_like(ids))
        except Exception as error:  # each architecture fails in its own way
            raise ConfigError(
                f"{self.folder} can't read {longest} tokens as an encoder: {error}", fix="lower max_tokens under [preprocess]"
            ) from error


def encoder_folder(task: Task) -> Path:
    """The folder that [small] path names: a fetched model, or the user's own, relative to task.toml.

    Raises:
        ConfigError: no such folder, one without safetensors, or the task's preprocessing isn't its tokenizer.
    """
    name = task.small.path
    if not name:
        raise ConfigError('[small] kind = "encoder" needs a path', fix=f"path = a Hugging Face folder, or one of {', '.join(MODELS)}")
    if task.preprocess.kind != "tokenizer":
        raise ConfigError(
            f'[small] kind = "encoder" reads tokens, [preprocess] kind is {task.preprocess.kind!r}',
            fix='set kind = "tokenizer" under [preprocess]',
        )
    if task.preprocess.tokenizer:
        raise ConfigError("[preprocess] tokenizer is set, but an encoder brings its own tokenizer.json", fix="remove that key")
    folder = model_path(name if name in MODELS else str(task.path(name)))
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no safetensors file", fix='transformers: model.save_pretrained("FOLDER") writes one')
    return folder


def content_hash(folder: Path) -> str:
    """SHA-256 over everything that an embedding depends on: config.json, tokenizer.json and the weights."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))]:
        if not path.is_file():
            raise ConfigError(f"{folder} has no {path.name}")
        digest.update(f"{path.name}\x00{path.stat().st_size}\x00".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
