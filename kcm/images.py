"""Image file → the graph's input: the one implementation that training, edge and cloud share.

What is read: JPEG and PNG, told by their content. Size and pixels are checked in the header, before anything is decoded. Pillow's
classes are used directly, not Image.open: that would warn, or not, by limits that belong to the application's process.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kcm.errors import require
from kcm.preprocess import Inputs, InputSpec, as_image
from kcm.task import PreprocessSpec

Pixels = NDArray[np.uint8]

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "XML"}
# Each scan of a progressive JPEG goes over all of its pixels, so a small file of many costs minutes. Real ones have about ten.
_MOST_SCANS = 64
_SCAN = b"\xff\xda"  # cannot occur in entropy-coded data
_GAP = 2.0  # a photo is scaled down by whole numbers, in the JPEG decoder first, to this many times the size; the filter does the rest
_PAPER = 255  # what lies behind transparent pixels: white
_ORIENTATION = 0x0112  # EXIF
_TURNS = {  # EXIF orientation → Image.Transpose that sets it upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImagePreprocessor:
    """JPEG or PNG → image uint8 [B, S, S, 3]: RGB, height, width, channel.

    "crop" scales the shorter side to S and cuts the middle out, "squash" scales both sides; bilinear, with the support of the whole
    scale (no aliasing). An upright S × S image passes untouched. EXIF orientation is applied, colour profiles are not; transparency lies on
    white, 16 bits lose the lower 8, and of several frames the first is read.
    """

    names = ("image",)

    def __init__(self, spec: PreprocessSpec) -> None:
        self._spec, self._pillow = spec, _pillow()
        self.inputs = {"image": InputSpec(np.dtype(np.uint8), 0, shape=(spec.size, spec.size, 3))}

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        """Raises ValueError for text, or for an image that is too large, of another format, cut short or damaged."""
        size = self._spec.size
        image = np.empty((len(payloads), size, size, 3), np.uint8)
        for row, payload in enumerate(payloads):
            image[row] = self.pixels(as_image(payload))
        return {"image": image}

    def pixels(self, data: bytes) -> Pixels:
        """[S, S, 3] of one image file. Raises ValueError."""
        _check_length(len(data), self._spec)
        image = _opened(self._pillow, io.BytesIO(data), self._spec)
        if data.startswith(_JPEG) and (scans := data.count(_SCAN)) > _MOST_SCANS:
            raise ValueError(f"the JPEG has {scans} scans, at most {_MOST_SCANS} are taken")
        try:
            return self._scaled(image)
        except Exception as error:  # the library raises a dozen types without a common base
            raise ValueError(_damage(error)) from error

    def _scaled(self, image: Any) -> Pixels:
        size, crop = self._spec.size, self._spec.resize == "crop"
        turn = _turn(self._pillow, image.info.get("exif", b""))
        if image.size != (size, size):
            width, height = image.size
            scale = size / min(width, height)
            least = (width * scale, height * scale) if crop else (size, size)
            if image.format == "JPEG":
                image.draft(None, tuple(max(1, int(side * _GAP)) for side in least))
        image = _rgb(self._pillow, image)
        if image.size != (size, size):
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side) if crop else None
            image = image.resize((size, size), self._pillow.image.Resampling.BILINEAR, box, _GAP)
        return np.asarray(image if turn is None else image.transpose(turn))


class TooLarge(ValueError):
    """More bytes or pixels than the task takes: nothing is wrong with the image."""


class Header(NamedTuple):
    """What an image file says of itself: its pixels as stored, and its bytes."""

    width: int
    height: int
    length: int


def read_header(source: bytes | IO[bytes], spec: PreprocessSpec) -> Header:
    """The header of an image file. Nothing is decoded.

    Raises:
        TooLarge: too many bytes or pixels.
        ValueError: neither JPEG nor PNG, or damaged.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    _check_length(length, spec)
    width, height = _opened(_pillow(), file, spec).size
    return Header(width, height, length)


def png(pixels: Pixels) -> bytes:
    """Pixels uint8 [H, W, 3] as a PNG file. Lossless: the preprocessor of that size gives back the same pixels."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    out = io.BytesIO()
    # The least effort: small images gain little from more, and tens of thousands of them are written.
    _pillow().image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", compress_level=1)
    return out.getvalue()


class _Pillow(NamedTuple):
    image: ModuleType
    jpeg: Any  # the classes of the two formats
    png: Any


@cache
def _pillow() -> _Pillow:
    """Raises MissingExtraError."""
    image, jpeg, png_ = (require(f"PIL.{name}", "edge") for name in ("Image", "JpegImagePlugin", "PngImagePlugin"))

    class Jpeg(jpeg.JpegImageFile):  # type: ignore[misc,name-defined]
        def _read_dpi_from_exif(self) -> None:
            """Not wanted: it warns of EXIF data that it can't read."""

    return _Pillow(image, Jpeg, png_.PngImageFile)


def _check_length(length: int, spec: PreprocessSpec) -> None:
    if length > spec.max_bytes:
        raise TooLarge(f"the image has {length} bytes, at most {spec.max_bytes} are taken")


def _opened(pillow: _Pillow, file: IO[bytes], spec: PreprocessSpec) -> Any:
    """The image, its header read and found good. Raises ValueError or TooLarge."""
    head = file.read(16)
    file.seek(0)
    if head.startswith(_JPEG):
        reader = pillow.jpeg
    elif head.startswith(_PNG):
        reader = pillow.png
    else:
        raise ValueError(f"the payload is {_looks_like(head)}: JPEG and PNG are read")
    try:
        image = reader(file)
    except Exception as error:  # the library raises a dozen types without a common base
        raise ValueError(_damage(error)) from error
    width, height = image.size
    if width * height > spec.max_pixels:
        raise TooLarge(f"the image is {width} × {height}, at most {spec.max_pixels} pixels are taken")
    return image


def _rgb(pillow: _Pillow, image: Any) -> Any:
    """The decoded image in mode RGB: before it is scaled, since palettes can't be, and transparent pixels have no colour to blend."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey; the library's own conversion would cut off at 255
        return pillow.image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = pillow.image.new("RGBA", layer.size, (_PAPER, _PAPER, _PAPER, 255))
        return pillow.image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _turn(pillow: _Pillow, exif: bytes) -> Any:
    """How to set the image upright; None: it is. Read here, since the library warns of EXIF data that it can't read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        tags = dict(struct.unpack_from(f"{order}H6xH", tiff, start + 2 + 12 * place) for place in range(count))
    except struct.error:  # what is behind it may be gone; a photo isn't refused for that
        return None
    name = _TURNS.get(tags.get(_ORIENTATION, 1))
    return None if name is None else pillow.image.Transpose[name]


def _damage(error: Exception) -> str:
    """A reason without the library's words, which may quote the payload."""
    return "the image is cut short" if "truncated" in str(error).lower() else "the image is damaged and can't be decoded"


def _looks_like(head: bytes) -> str:
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return "HEIF, AVIF or video"
    return next((name for magic, name in _OTHERS.items() if head.startswith(magic)), "of an unknown format")
