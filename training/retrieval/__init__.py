"""Retrieval between images and texts: a task's labels are a gallery's items, and its models score all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kcm.task import Task

if TYPE_CHECKING:
    from training.ngrams import WordVectors
    from training.small import Small


def load_dual(task: Task, vectors: Callable[[], WordVectors], embed: Callable[[Sequence[str]], NDArray[np.float32]]) -> Small:
    """The trainer of a small model that searches the task's gallery. Files are read at the first fit.

    Args:
        vectors: of words, for queries that are texts. embed: encodes a gallery's captions, for queries that are images.
    """
    if task.modality == "image":
        from training.retrieval.image_query import DualImages

        return DualImages(task, embed)
    from training.retrieval.text_query import DualTexts

    return DualTexts(task, vectors)
