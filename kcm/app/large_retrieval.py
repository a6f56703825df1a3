"""A retrieval task's large model: fitted on pairs of images and texts, or a CLIP model, and written as the cloud serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.assets import MODELS, model_path
from kcm.preprocess import as_text
from kcm.sample import Payload
from kcm.task import PreprocessSpec, Task

if TYPE_CHECKING:
    from training.data import Split
    from training.retrieval.large import GalleryHead
    from training.vision.frozen import Backbone

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]
Parts = tuple[dict[str, Any], dict[str, bytes]]  # of large.json, and the files beside it

_SIDE = 128  # pixels a side for the image encoder, where [large] names none
_IMAGENET = PreprocessSpec(kind="image", size=_SIDE)


def make_large_retrieval(task: Task, folder: Path, train: Split | None, progress: Progress, *, hints: bool) -> None:
    """Write the large model. Its temperature, and the weight that a hint has, are fitted on the edge's labelled rows, which it never saw.

    Args:
        train: those rows; None: the temperature is 1 and it reads no hints.
        hints: fit the hint's weight, too, which takes a small model.

    Raises:
        ConfigError: an encoder's weights aren't there.
        DataError: the task names no pairs, or a row of them can't be read.
    """
    from cloud_server.models import load_large
    from kcm.app.large_images import hint_priors, said_weight
    from training.large_head import write_large
    from training.vision.large import KeptBack, fit_hint_weight, fit_temperature

    described, files = _clip(task) if task.large.kind == "clip" else _dual(task, progress)

    def write(temperature: float, weight: float) -> None:
        write_large(folder, task, {**described, "temperature": temperature, "hint_weight": weight}, files)

    write(_RAISED, 0.0)
    if train is None:
        return
    logits = load_large(folder).logits(train.payloads, [None] * len(train))
    # log_softmax(logits / T₀) comes back, or logits / T₀: a temperature on top of either is one of the logits themselves.
    nothing = np.zeros(len(task.labels), np.float32)
    kept = KeptBack(logits, train.y, nothing, fit_temperature(logits, train.y, nothing))
    weight = fit_hint_weight(kept, hint_priors(task, train, progress)) if hints else 0.0
    progress(f"large model: temperature {_RAISED * kept.temperature:.3f}, {said_weight(weight, hints)}, on {len(train)} labelled rows")
    write(_RAISED * kept.temperature, weight)


_RAISED = 0.05  # a temperature near that of cosines, from which the fitted one is looked for


def large_inputs(task: Task) -> PreprocessSpec:
    """How the large model reads an image."""
    limits = {"max_bytes": task.preprocess.max_bytes, "max_pixels": task.preprocess.max_pixels, "resize": task.preprocess.resize}
    return msgspec.structs.replace(_IMAGENET, size=task.large.size or _SIDE, **limits)


def _dual(task: Task, progress: Progress) -> Parts:
    """Both encoders are frozen; what is fitted is folded with the gallery into one head, so that a plain classifier serves it."""
    from cloud_server.models.encoder import Encoder
    from training.retrieval.gallery import distinct, load_gallery, load_pairs
    from training.retrieval.large import fit_gallery_head
    from training.vision.frozen import Backbone

    pairs, gallery = load_pairs(task), load_gallery(task)
    encoder = Encoder(model_path(task.large.model, task.root), task.large.max_tokens)
    backbone = Backbone(task.large.net, large_inputs(task), task.root, progress)
    progress(f"large model: {len(pairs)} pairs of images and texts")

    def texts(payloads: Sequence[Payload]) -> Float32:
        return encoder.embed([as_text(payload) for payload in payloads])

    def images(payloads: Sequence[Payload]) -> Float32:
        once, place = distinct(payloads)
        return backbone.features(once)[place]

    if task.modality == "image":
        head = fit_gallery_head(images(pairs.images), texts(pairs.texts), gallery, texts(gallery.payloads))
        return _image_parts(task, head, backbone)
    head = fit_gallery_head(texts(pairs.texts), images(pairs.images), gallery, images(gallery.payloads))
    return _text_parts(task, head)


def _image_parts(task: Task, head: GalleryHead, backbone: Backbone) -> Parts:
    from export.vision import traced_images
    from training.vision.frozen import with_head
    from training.vision.kind import vision_model
    from training.vision.large import GRAPH

    spec = large_inputs(task)
    net = with_head(backbone.net, np.ascontiguousarray(head.weight.T), head.bias)
    module = vision_model("efficientnet-lite", net, len(task.labels), spec).module()
    graph = traced_images(module, spec.size).SerializeToString()
    return {"kind": "efficientnet-lite", "model": GRAPH, "preprocess": msgspec.to_builtins(spec)}, {GRAPH: graph}


def _text_parts(task: Task, head: GalleryHead) -> Parts:
    from safetensors.numpy import save

    described = {"kind": "encoder", "model": _model_name(task), "max_tokens": task.large.max_tokens}
    return described, {"head.safetensors": save({"weight": np.ascontiguousarray(head.weight.T), "bias": head.bias})}


def _clip(task: Task) -> Parts:
    """The gallery travels with the description; the server embeds it when it loads the model."""
    from cloud_server.models.clip import GALLERY, Item, image_spec
    from training.retrieval.gallery import load_gallery

    gallery = load_gallery(task)
    rows = [
        Item(label=int(item), **{"text" if isinstance(payload, str) else "image": payload})  # type: ignore[arg-type]
        for payload, item in zip(gallery.payloads, gallery.items, strict=True)
    ]
    spec = image_spec(model_path(task.large.model, task.root), task.preprocess)
    described = {"kind": "clip", "model": _model_name(task), "queries": task.modality, "preprocess": msgspec.to_builtins(spec)}
    return described, {GALLERY: msgspec.json.Encoder().encode_lines(rows)}


def _model_name(task: Task) -> str:
    return task.large.model if task.large.model in MODELS else str(task.path(task.large.model).resolve())
