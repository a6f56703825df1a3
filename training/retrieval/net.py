"""The small net of image queries: pixels → one linear map of low rank → similarities to all items of the gallery."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GalleryNet(nn.Module):
    """images [B, 3, S, S] → logits [B, G]: flattened, centred, to the gallery's space [D], and times the gallery.

    Plain Sub and MatMul: the gallery is a constant of the graph, and searching it is a product of a thousand rows.
    """

    centre: Tensor  # [3 · S · S], of normalised pixels
    tower: Tensor  # [3 · S · S, D]
    gallery: Tensor  # [D, G], with the logits' scale

    def __init__(self, centre: Tensor, tower: Tensor, gallery: Tensor) -> None:
        super().__init__()
        for name, tensor in {"centre": centre, "tower": tower, "gallery": gallery}.items():
            self.register_buffer(name, tensor)

    @property
    def heads(self) -> list[nn.Linear]:
        """None: a class prior shifts nothing here."""
        return []

    def forward(self, images: Tensor) -> Tensor:
        return (torch.flatten(images, 1) - self.centre) @ self.tower @ self.gallery


def net_of(tensors: dict[str, Tensor], size: int, classes: int) -> GalleryNet:
    """The net of its saved tensors. Raises ValueError where they are of another size or of another number of items."""
    names = ("centre", "tower", "gallery")
    if set(tensors) != set(names):
        raise ValueError(f"it holds {', '.join(sorted(tensors))}, not {', '.join(names)}")
    net = GalleryNet(*(tensors[name] for name in names))
    width = len(net.gallery)
    shapes = {"centre": (3 * size * size,), "tower": (3 * size * size, width), "gallery": (width, classes)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, {size} × {size} pixels and {classes} items want {list(shape)}")
    return net
