"""Drawn pictures with captions, as a user's folder of pairs, and the retrieval task made of them."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "black": (20, 20, 20),
    "pink": (245, 130, 190),
    "brown": (120, 70, 30),
    "grey": (130, 130, 130),
    "orange": (245, 140, 20),
}
SHAPES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "disc": 40, "star": -5, "cross": -4, "bar": 0, "ring": 1, "dot": 2}


def picture(colour: str, shape: str, size: int = 40, scale: float = 1.0) -> Image.Image:
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw, middle, radius = ImageDraw.Draw(image), size / 2, 0.42 * size * scale
    paint, corners = COLOURS[colour], SHAPES[shape]
    if shape == "bar":
        draw.rectangle((middle - radius, middle - radius / 4, middle + radius, middle + radius / 4), fill=paint)
    elif shape == "ring":
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), outline=paint, width=max(2, size // 10))
    elif shape == "dot":
        draw.ellipse((middle - radius / 3, middle - radius / 3, middle + radius / 3, middle + radius / 3), fill=paint)
    else:
        count = 2 * -corners if corners < 0 else corners
        points = []
        for k in range(count):
            r = radius * (0.4 if corners < 0 and k % 2 else 1.0)
            angle = 2 * math.pi * k / count - math.pi / 2
            points.append((middle + r * math.cos(angle), middle + r * math.sin(angle)))
        draw.polygon(points, fill=paint)
    return image


def write_pairs(folder: Path) -> Path:
    """90 items: a colour and a shape each, two pictures and two wordings of all, by captions.csv."""
    folder.mkdir(parents=True)
    rows = ["image,text"]
    for colour in COLOURS:
        for shape in SHAPES:
            for place, scale in enumerate((1.0, 0.8)):
                name = f"{colour}-{shape}-{place}.png"
                picture(colour, shape, scale=scale).save(folder / name)
                rows += [f"{name},a {colour} {shape}", f"{name},{shape} in {colour}"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder
