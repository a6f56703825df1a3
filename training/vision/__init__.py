"""Image classifiers: nets, long-tail losses, fitting; small models on the edge and large ones in the cloud."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kcm.task import Task

if TYPE_CHECKING:
    from training.small import Small


def load_vision(task: Task, progress: Callable[[str], None] = lambda _: None) -> Small:
    """The trainer of the task's kind of small image model.

    Raises:
        ConfigError: a ResNet's depth isn't 6n + 2, or the weights to start from aren't there.
    """
    if task.small.kind == "efficientnet-lite" and task.small.net.frozen:
        from training.vision.frozen import FrozenVision

        return FrozenVision(task, progress)
    from training.vision.kind import Vision

    return Vision(task, progress)
