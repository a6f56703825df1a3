"""Image files of every form become the same pixels, or are refused with a reason that quotes nothing of them."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import jpeg, png, saved, scene
from numpy.typing import NDArray
from PIL import Image, ImageFile

import kcm.images
from kcm.errors import MissingExtraError
from kcm.images import ImagePreprocessor, read_header
from kcm.preprocess import batch_of, check_sums, load_preprocessor, longest_of
from kcm.sample import Tensors
from kcm.task import PreprocessSpec

Pixels = NDArray[np.uint8]
SCENE = scene(32, 32)


def spec(**values: object) -> PreprocessSpec:
    return PreprocessSpec(kind="image", **values)  # type: ignore[arg-type]


def read(data: bytes, **values: object) -> Pixels:
    image = ImagePreprocessor(spec(**values)).batch([data])["image"]
    assert image.dtype == np.uint8
    return image[0]


def off(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def test_a_png_of_the_size_comes_back_to_the_bit() -> None:
    assert np.array_equal(read(kcm.images.png(SCENE)), SCENE)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    assert np.array_equal(read(kcm.images.png(noise), size=224), noise)


def test_a_jpeg_of_the_size_is_what_the_decoder_gives() -> None:
    data = jpeg(SCENE)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(read(data), np.asarray(image))
    assert off(read(data), SCENE) < 2


@pytest.mark.parametrize(
    "form", ["palette", "grey", "grey16", "cmyk", "progressive", "grey-jpeg", "rgb16", "bit", "interlaced", "palette4"]
)
def test_every_form_of_a_file_gives_its_colours(form: str) -> None:
    image = Image.fromarray(SCENE)
    grey = image.convert("L")
    if form == "palette":
        got, want, near = read(png(image.quantize(256))), SCENE, 9.0
    elif form == "palette4":
        flat = Image.fromarray(SCENE).quantize(8)
        got, want, near = read(png(flat, bits=4)), np.asarray(flat.convert("RGB")), 0.0
    elif form == "grey":
        got, want, near = read(png(grey)), np.asarray(grey.convert("RGB")), 0.0
    elif form == "grey16":
        deep = np.asarray(grey).astype(np.uint16) * 256 + 77
        got, want, near = read(png(Image.fromarray(deep))), np.asarray(grey.convert("RGB")), 0.0
    elif form == "rgb16":
        got, want, near = read(png16(SCENE)), SCENE, 0.0
    elif form == "cmyk":
        got, want, near = read(jpeg(image.convert("CMYK"))), SCENE, 4.0
    elif form == "progressive":
        got, want, near = read(jpeg(image, progressive=True)), read(jpeg(image)), 0.0
    elif form == "grey-jpeg":
        got, want, near = read(jpeg(grey)), np.asarray(grey.convert("RGB")), 2.0
    elif form == "bit":
        got, want, near = read(png(grey.convert("1"))), np.asarray(grey.convert("1").convert("RGB")), 0.0
    else:
        got, want, near = read(interlaced()), np.full((32, 32, 3), 7, np.uint8), 0.0
    assert off(got, want) <= near


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bare_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, interlace: int = 0, body: bytes = b"", more: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def split_png(between: bytes) -> bytes:
    """Its data lie in two chunks, with something in between."""
    body = zlib.compress(scene(64, 64).tobytes())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body[:200]) + between + chunk(b"IDAT", body[200:]) + chunk(b"IEND", b"")


def png16(image: Pixels) -> bytes:
    """16 bits a channel, as no writer here does."""
    rows = b"".join(b"\0" + (row.astype(">u2") * 256 + 77).astype(">u2").tobytes() for row in image)
    return bare_png(image.shape[1], image.shape[0], depth=16, body=rows)


def interlaced() -> bytes:
    passes = [(4, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32)]  # rows, columns of Adam7's passes over 32 × 32
    body = b"".join((b"\0" + bytes([7]) * (3 * columns)) * rows for rows, columns in passes)
    return bare_png(32, 32, interlace=1, body=body)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    clear = np.zeros((32, 32, 4), np.uint8)  # transparent black: an alpha channel that is dropped would show black
    clear[8:24, 8:24] = (200, 200, 200, 255)
    want = np.full((32, 32, 3), 255, np.uint8)
    want[8:24, 8:24] = 200
    image = Image.fromarray(clear)
    if mode == "P":
        data = png(image.quantize(4))
        assert off(read(data), want) < 3
        return
    key = {"RGB": {"transparency": (0, 0, 0)}, "L": {"transparency": 0}}.get(mode, {})
    data = png(image.convert(mode), **key)
    assert np.array_equal(read(data), want)


def test_half_transparent_edges_have_no_dark_rim_when_scaled() -> None:
    image = np.zeros((64, 64, 4), np.uint8)
    image[:, 32:] = (255, 255, 255, 255)
    assert read(png(Image.fromarray(image))).min() == 255  # white on white: the black under transparent pixels must not bleed


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(32, 32), (90, 120), (300, 200)])
def test_a_turned_photo_is_set_upright(orientation: int, kind: str, shape: tuple[int, int]) -> None:
    upright = Image.fromarray(scene(*shape, seed=3))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Transpose that the camera applied
    turned = upright if stored is None else upright.transpose(Image.Transpose(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    got, want = read(saved(turned, kind, exif=exif, **options)), read(saved(upright, kind, **options))
    assert off(got, want) < 2


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*garbage", b"no"]
)
def test_damaged_exif_data_costs_no_photo_and_no_warning(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(jpeg(SCENE, exif=exif)), read(jpeg(SCENE)))


def test_crop_cuts_the_middle_out_and_squash_keeps_all() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32, 0], wide[:, 32:64, 1], wide[:, 64:, 2] = 255, 255, 255
    assert np.array_equal(read(png(wide)), wide[:, 32:64])
    squashed = read(png(wide), resize="squash")
    assert [int(squashed[16, x].argmax()) for x in (3, 16, 28)] == [0, 1, 2]
    assert np.array_equal(read(png(wide.transpose(1, 0, 2))), wide[:, 32:64].transpose(1, 0, 2))


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("shape", [(720, 960), (900, 400), (33, 33), (20, 50)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_scaling_keeps_to_an_exact_filter(size: int, shape: tuple[int, int], resize: str) -> None:
    """Draft decoding and whole-number reduction are short cuts: what comes out is the plain filter's, within a level or two."""
    image = Image.fromarray(scene(*shape, seed=5))
    side = min(shape)
    top, left = (shape[0] - side) / 2, (shape[1] - side) / 2
    box = (left, top, left + side, top + side) if resize == "crop" else None
    want = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    for data in (png(image), jpeg(image)):
        got = read(data, size=size, resize=resize, max_bytes=2**23)
        assert off(got, want) < 2.5
        assert np.array_equal(got, read(data, size=size, resize=resize, max_bytes=2**23))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the payload is empty"),
        (b"secret words", "of an unknown format"),
        (saved(SCENE, "GIF"), "the payload is GIF"),
        (saved(SCENE, "BMP"), "the payload is BMP"),
        (saved(SCENE, "WEBP"), "the payload is WebP"),
        (saved(SCENE, "TIFF"), "the payload is TIFF"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (jpeg(SCENE)[:-300], "cut short"),
        (png(scene(64, 64))[:-40], "cut short"),
        (png(scene(64, 64))[:40], "damaged"),
        (png(SCENE).replace(b"IDAT", b"IDAX"), "damaged"),
        (bare_png(0, 5), "damaged"),
        (bare_png(32, 32, body=b"short"), "cut short|damaged"),
        (bare_png(32, 32, depth=7, body=b"x"), "damaged"),
        (split_png(chunk(b"\xd1\x97Y\x85", b"secret")), "damaged"),
    ],
    ids=range(16),
)
def test_what_is_no_whole_jpeg_or_png_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        read(data)
    assert "secret" not in str(error.value)


def test_text_is_refused() -> None:
    with pytest.raises(ValueError, match="this task reads images, the payload is text"):
        ImagePreprocessor(spec()).batch(["a text"])
    with pytest.raises(ValueError, match="this task reads text, the payload is an image"):
        load_preprocessor(PreprocessSpec(), {}).batch([png(SCENE)])


def bomb(width: int, height: int) -> bytes:
    """Few bytes, many pixels: zeros."""
    return bare_png(width, height, depth=1, colour=0, body=bytes((width // 8 + 2) * height))


def test_a_bomb_is_refused_by_its_header_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(30_000, 30_000)
    assert len(data) < 2**18
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor a warning of the library's
        for refuse in (lambda: read(data), lambda: read_header(data, spec())):
            with pytest.raises(ValueError, match=r"the image is 30000 × 30000, at most 16777216 pixels"):
                refuse()


def test_the_applications_own_pixel_limit_is_neither_needed_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(png(SCENE)), SCENE)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_the_limits_hold_to_the_byte_and_the_pixel() -> None:
    data = png(SCENE)
    assert np.array_equal(read(data, max_bytes=len(data), max_pixels=1024), SCENE)
    with pytest.raises(ValueError, match=f"{len(data)} bytes, at most {len(data) - 1}"):
        read(data, max_bytes=len(data) - 1)
    with pytest.raises(ValueError, match="32 × 32, at most 1023 pixels"):
        read(data, max_pixels=1023)
    for limit in ({"max_bytes": len(data) - 1}, {"max_pixels": 1023}):
        with pytest.raises(ValueError, match="at most"):
            read_header(data, spec(**limit))


def test_a_jpeg_of_very_many_scans_is_refused_at_once() -> None:
    """Each scan goes over the whole picture: 4 MiB of them would keep a core busy for minutes."""
    data = jpeg(scene(2000, 2000), progressive=True)
    first = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    scan = data[first : data.index(b"\xff", first + 20)]
    many = data[:-2] + scan * 2000 + data[-2:]
    began = time.perf_counter()
    with pytest.raises(ValueError, match="scans, at most 64"):
        read(many, max_bytes=2**23)
    assert time.perf_counter() - began < 0.5
    read(data, max_bytes=2**23)


def test_text_chunks_that_unpack_to_megabytes_are_refused() -> None:
    with pytest.raises(ValueError, match="damaged"):
        read(bare_png(32, 32, body=bytes(97 * 32), more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26)))))


def test_the_first_of_several_frames_is_read() -> None:
    frames = [Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in (10, 200)]
    assert int(read(saved(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=9)).max()) == 10
    assert int(read(saved(frames[0], "MPO", save_all=True, append_images=frames[1:])).max()) < 16


def test_the_header_is_read_off_a_file_too() -> None:
    assert read_header(io.BytesIO(jpeg(scene(40, 50))), spec())[:2] == (50, 40)
    assert read_header(png(scene(40, 50)), spec())[:2] == (50, 40)


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_no_damage_is_worse_than_a_value_error(data: st.DataObject) -> None:
    whole = data.draw(
        st.sampled_from([png(SCENE), jpeg(SCENE), jpeg(scene(50, 70), progressive=True), png(Image.fromarray(SCENE).quantize(9))])
    )
    bad = bytearray(whole)
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(bad) - 1), st.integers(0, 255)), max_size=6)):
        bad[place] = value
    bad = bad[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(ValueError):
            image = ImagePreprocessor(spec(max_pixels=2**16)).batch([bytes(bad)])["image"]
            assert image.shape == (1, 32, 32, 3)


def test_batches_tensors_and_files_mix() -> None:
    preprocessor = load_preprocessor(spec(), {})
    assert preprocessor.names == ("image",) and longest_of(preprocessor) == {"image": 32}
    assert preprocessor.batch([])["image"].shape == (0, 32, 32, 3)
    rows = [SCENE, scene(32, 32, seed=1)]
    row = Tensors({"image": rows[1]})
    got = batch_of([png(rows[0]), row, Tensors({"image": rows[0].tobytes()}), Tensors({"image": rows[1].ravel()})], preprocessor)["image"]
    assert np.array_equal(got, np.stack([rows[0], rows[1], rows[0], rows[1]]))
    assert check_sums({"image": got}).tolist() == [int(image.sum(dtype=np.int64)) for image in got]
    for bad in (rows[0][:16], rows[0].astype(np.float32), bytes(7), rows[0].transpose(2, 0, 1)):
        with pytest.raises(ValueError, match="tensor 'image'"):
            batch_of([Tensors({"image": bad})], preprocessor)
    with pytest.raises(ValueError, match="the graph reads image"):
        batch_of([Tensors({"ids": rows[0]})], preprocessor)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kcm.images._pillow.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="PIL") as error:
        ImagePreprocessor(spec())
    assert "kcm[edge]" in error.value.fix
