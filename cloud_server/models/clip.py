"""A CLIP model in transformers' format as the large model of a retrieval task: the gallery is embedded once, each query when it comes.

    logits = logit_scale · cos(query, item)        an item's embedding is the mean of its wordings' or pictures' (Radford et al. 2021)

The folder holds large.json and gallery.jsonl; the model lies where large.json says. Images go through kcm/images.py, so that size and pixel
limits hold, with the size, mean and deviation of preprocessor_config.json; bilinear, where CLIP's own script is bicubic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import logging as hf_logging

from cloud_server.models import LargeFile
from kcm.errors import ConfigError
from kcm.fusion import fuse, fusion_id, log_prior
from kcm.images import ImagePreprocessor, Pixels
from kcm.preprocess import as_image, as_text
from kcm.sample import Float32, Hint, Payload
from kcm.task import PreprocessSpec
from protos.kcm.v1 import sample_pb2

GALLERY = "gallery.jsonl"
_ROWS = 32  # of one pass
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own training, pixels 0..1


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of gallery.jsonl: content of the item `label`, a text or an image file as base64."""

    label: int
    text: str | None = None
    image: bytes | None = None


def image_spec(folder: Path, limits: PreprocessSpec) -> PreprocessSpec:
    """How the CLIP model in `folder` reads an image, with the limits of a task. Raises ConfigError where its files can't be read."""
    try:
        size = int(json.loads((folder / "config.json").read_bytes())["vision_config"]["image_size"])
        file = folder / "preprocessor_config.json"
        pixels: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        mean, std = (tuple(255 * float(x) for x in pixels.get(key, usual)) for key, usual in (("image_mean", _MEAN), ("image_std", _STD)))
        spec = {"kind": "image", "size": size, "mean": mean, "std": std, "max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels}
        return msgspec.convert(spec, PreprocessSpec)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} can't be read as a CLIP model: {error}", fix="a folder of CLIPModel.save_pretrained") from error


class ClipModel:
    """Similarities of images to a gallery of texts, or of texts to a gallery of images."""

    def __init__(self, folder: Path, large: LargeFile) -> None:
        """Load the model and embed the gallery.

        Raises:
            ConfigError: the model or the gallery is missing or unreadable, or an item has no content.
        """
        hf_logging.disable_progress_bar()
        weights = large.weights(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(weights), local_files_only=True, trust_remote_code=False)
            model: Any = CLIPModel.from_pretrained(str(weights), local_files_only=True, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{weights} can't be loaded as a CLIP model: {error}") from error
        self._model = model.eval()
        self._spec = image_spec(weights, large.preprocess)
        self._preprocessor = ImagePreprocessor(self._spec)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)
        self._images = large.queries == "image"
        self._temperature, self._weight = large.temperature, large.hint_weight
        self.labels = large.labels
        self.reads_hints = large.hint_weight > 0.0
        self.teacher_id = f"clip-{large.large_id}"
        self.prompt_id = fusion_id(temperature=large.temperature, weight=large.hint_weight) if self.reads_hints else "none"
        self.scores_kind = sample_pb2.Scores.LOGIT
        self._gallery_DG = np.float32(float(model.logit_scale.detach().exp())) * self._embedded_gallery(folder / GALLERY).T

    def read(self, payload: Payload) -> Pixels | str:
        """An image's pixels uint8 [S, S, 3], or the text. Raises ValueError for another modality, or an image that can't be read."""
        return self._preprocessor.pixels(as_image(payload)) if self._images else as_text(payload)

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, G]: log_softmax(logits / T) + w · log p_hint. Raises ValueError as `read` does."""
        parts = [
            self.scores([self.read(sample) for sample in samples[start : start + _ROWS]], hints[start : start + _ROWS])
            for start in range(0, len(samples), _ROWS)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.labels)), np.float32)

    def scores(self, ready: Sequence[Any], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, G] of queries that were read."""
        prior_BG = log_prior(hints if self.reads_hints else [None] * len(ready), len(self.labels))
        queries_BD = self._pixel_vectors(np.stack(ready)) if self._images else self._text_vectors(ready)
        return fuse(queries_BD @ self._gallery_DG, prior_BG, temperature=self._temperature, weight=self._weight)

    def _embedded_gallery(self, path: Path) -> Float32:
        """[G, D], rows of length 1."""
        try:
            rows = msgspec.json.Decoder(Item).decode_lines(path.read_bytes())
            if not rows:
                raise ValueError("it is empty")
            content = [row.image if row.text is None else row.text for row in rows]
            if any((row.text is None) is self._images or payload is None for row, payload in zip(rows, content, strict=True)):
                raise ValueError(f"a row is no {'text' if self._images else 'image'}")
            vectors = self._text_vectors(content) if self._images else self._image_vectors(content)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} can't be read as a gallery: {error}", fix="kcm train-large --task TASK --out FOLDER") from error
        total = np.zeros((len(self.labels), vectors.shape[1]), np.float32)
        labels = np.array([row.label for row in rows], np.int64)
        counts = np.bincount(labels, minlength=len(self.labels)) if labels.min() >= 0 else np.zeros(len(self.labels))
        if len(counts) != len(self.labels) or not counts.all():
            raise ConfigError(f"{path} doesn't hold content for each of the {len(self.labels)} labels, and for no other")
        np.add.at(total, labels, vectors)
        unit: Float32 = total / np.linalg.norm(total, axis=1, keepdims=True)
        return unit

    def _text_vectors(self, texts: Sequence[str]) -> Float32:
        parts = []
        for start in range(0, len(texts), _ROWS):
            given = self._tokenizer(
                list(texts[start : start + _ROWS]), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            with torch.inference_mode():
                found = self._model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
            parts.append(_unit_rows(found))
        return np.concatenate(parts)

    def _image_vectors(self, images: Sequence[Payload]) -> Float32:
        starts = range(0, len(images), _ROWS)
        return np.concatenate([self._pixel_vectors(self._preprocessor.batch(images[start : start + _ROWS])["image"]) for start in starts])

    def _pixel_vectors(self, image_BSSC: Pixels) -> Float32:
        spec, pixels = self._spec, torch.from_numpy(image_BSSC)
        x = (pixels.to(torch.float32) - torch.tensor(spec.mean)) / torch.tensor(spec.std)
        with torch.inference_mode():
            return _unit_rows(self._model.get_image_features(pixel_values=x.permute(0, 3, 1, 2).contiguous()))


def _unit_rows(found: Any) -> Float32:
    """Projected features [B, D] of length 1; transformers 5 hands them out within an output object."""
    features = getattr(found, "pooler_output", found)
    rows: Float32 = torch.nn.functional.normalize(features, dim=-1).numpy()
    return rows
