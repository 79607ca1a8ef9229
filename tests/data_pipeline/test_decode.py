"""Decoding: every format in use, upright, RGB, or a clear refusal."""

import io
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from data_pipeline.decode import DecodeError, Scratch, decode, jpeg_orientation, read_header
from tests.data_pipeline.photos import encoded, jpeg, picture

LIMIT = 10**6
GOLDENS = Path(__file__).parents[1] / "goldens"


def load(data: bytes, factor: int = 1) -> np.ndarray:
    return decode(data, read_header(data, LIMIT), factor)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_plain_jpeg_is_close_to_the_picture():
    pixels = picture(1)
    header = read_header(jpeg(pixels), LIMIT)
    assert (header.height, header.width, header.orientation) == (60, 80, 1)
    assert header.picture is None
    assert difference(load(jpeg(pixels)), pixels) < 3


def test_grey_jpeg_becomes_rgb():
    grey = picture(2)[:, :, 0]
    found = load(saved(Image.fromarray(grey), "JPEG", quality=95))
    assert found.shape == (60, 80, 3)
    assert difference(found, np.repeat(grey[:, :, None], 3, axis=2)) < 3


def inks(seed: int) -> np.ndarray:
    """(60, 80, 4) uint8: cyan, magenta, yellow and black, 255 for full ink."""
    return np.dstack([picture(seed) // 2, picture(seed + 100)[:, :, 0] // 2])


def printed(ink: np.ndarray) -> np.ndarray:
    """RGB of inks on white paper."""
    return (255 - ink[:, :, :3].astype(float)) * (255 - ink[:, :, 3:].astype(float)) / 255


def test_cmyk_jpegs_are_inverted_as_adobe_has_them():
    """Stored as 255 - ink, which the marker APP14 tells."""
    ink = inks(3)
    data = saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=98, subsampling=0)
    assert b"Adobe" in data and read_header(data, LIMIT).picture is not None
    assert difference(load(data), printed(ink)) < 3


def test_ycck_jpegs():
    """The same, with luminance and colour in place of inverted cyan, magenta and yellow."""
    ink = inks(4)
    # Pillow stores 255 - what it is given; the marker's last byte then says what the planes are.
    planes = 255 - np.asarray(Image.fromarray(ink[:, :, :3]).convert("YCbCr"))
    data = saved(
        Image.fromarray(np.dstack([planes, ink[:, :, 3]]), "CMYK"),
        "JPEG", quality=98, subsampling=0,
    )  # fmt: skip
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data = data[:transform] + b"\x02" + data[transform + 1 :]
    assert difference(load(data), printed(ink)) < 3


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_progressive_jpegs(subsampling):
    options = {"quality": 92, "subsampling": subsampling}
    image = Image.fromarray(picture(5))
    plain, progressive = (
        load(saved(image, "JPEG", progressive=progressive, **options))
        for progressive in (False, True)
    )
    assert np.array_equal(plain, progressive)
    assert difference(plain, picture(5)) < 4


def test_jpegs_with_colours_at_a_quarter_of_the_lines():
    """4:4:1 has no name in simplejpeg. As many blocks in a row as 4:1:1, in another shape."""
    pixels = np.full((64, 64, 3), (40, 120, 200), np.uint8)
    data = bytearray(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="411"))
    sampling = data.index(b"\xff\xc0") + 11
    assert data[sampling] == 0x41
    data[sampling] = 0x14
    assert difference(load(bytes(data)), pixels) < 3


def test_arithmetic_coded_jpegs():
    """Written by libjpeg 9e (the jpeglib package, quality 90, flag +ARITH_CODE); the picture is
    the one below."""
    data = (GOLDENS / "arithmetic_24x16.jpg").read_bytes()
    assert b"\xff\xc9" in data  # sequential, arithmetic
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    expected = Image.fromarray(coarse).resize((24, 16), Image.Resampling.BICUBIC)
    for form in (data, data + b"tail"):  # through both decoders
        assert difference(load(form), np.asarray(expected)) < 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_honoured_on_both_paths(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(picture(4)), kind, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB")))
    header = read_header(data, LIMIT)
    assert (header.height, header.width) == upright.shape[:2]
    assert (header.picture is None) == (kind == "JPEG")
    found = load(data)
    assert found.shape == upright.shape
    assert difference(found, upright) < 1


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_orientation_is_read_in_both_byte_orders(byte_order):
    mark = b"II" if byte_order == "little" else b"MM"

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, byte_order)

    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(6, 2) + bytes(2)
    tiff = mark + number(42, 2) + number(8, 4) + number(1, 2) + entry + bytes(4)
    block = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    data = jpeg(picture(5))
    assert jpeg_orientation(data[:2] + segment + data[2:]) == 6
    for cut in range(len(segment)):  # damaged EXIF blocks never stop anything
        assert jpeg_orientation(data[:2] + segment[:cut] + data[2:]) in range(1, 9)


def test_transparency_is_laid_over_white():
    pixels = np.dstack([picture(6), np.zeros((60, 80), np.uint8)])
    pixels[:30, :, 3] = 255
    found = load(encoded(pixels, "PNG"))
    assert np.array_equal(found[:30], pixels[:30, :, :3])
    assert (found[30:] == 255).all()


def test_palette_with_a_transparent_entry():
    image = Image.fromarray(picture(7)).quantize(8)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 2] = 255
    assert np.array_equal(load(saved(image, "PNG", transparency=2)), expected)
    assert np.array_equal(load(saved(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_palette_with_an_alpha_for_each_entry_and_half_transparency(kind):
    """Laid over white in the share of alpha."""
    pixels = np.dstack([picture(7), np.full((60, 80), 128, np.uint8)])
    image = Image.fromarray(pixels)
    data = saved(image.quantize(16), kind) if kind == "PNG" else saved(image, kind, lossless=True)
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
    expected = rgba[:, :, :3] * rgba[:, :, 3:] / 255 + 255 - rgba[:, :, 3:]
    assert np.abs(load(data) - expected).max() <= 1
    assert load(data).min() >= 126


def test_grey_with_alpha_and_two_colours():
    grey = picture(8)[:, :, 0]
    alpha = np.repeat(np.uint8([[0, 255]]), 40, axis=1).repeat(60, axis=0).reshape(60, 80)
    found = load(saved(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"))
    expected = np.where(alpha == 255, grey, 255)
    assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))
    bilevel = Image.fromarray(grey).convert("1")
    for kind in ("PNG", "TIFF", "BMP"):
        expected = np.asarray(bilevel).astype(np.uint8) * 255
        assert np.array_equal(load(saved(bilevel, kind)), np.repeat(expected[:, :, None], 3, 2))


def sixteen(channels: int) -> np.ndarray:
    ramp = np.linspace(0, 65535, 60 * 80 * channels).astype(np.uint16)
    return np.random.default_rng(0).permutation(ramp).reshape(60, 80, channels)


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    grey, colour = sixteen(1), sixteen(3)
    found = load(cv2.imencode(kind, grey)[1].tobytes())
    assert np.array_equal(found, np.repeat((grey >> 8).astype(np.uint8), 3, axis=2))
    bgr = np.ascontiguousarray(colour[:, :, ::-1])
    assert np.array_equal(load(cv2.imencode(kind, bgr)[1].tobytes()), colour >> 8)


def test_sixteen_bits_with_transparency():
    colour = sixteen(4)
    colour[:, :, 3] = np.where(np.arange(80) < 40, 0, 65535)
    found = load(cv2.imencode(".png", colour[:, :, [2, 1, 0, 3]])[1].tobytes())
    assert (found[:, :40] == 255).all()
    assert np.array_equal(found[:, 40:], colour[:, 40:, :3] >> 8)
    # One grey that stands for nothing, in the chunk tRNS before the pixels.
    grey = sixteen(1)[:, :, 0]
    clear = int(grey[5, 7])
    data = cv2.imencode(".png", grey)[1].tobytes()
    chunk = b"tRNS" + clear.to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    at = data.index(b"IDAT") - 4
    expected = np.where(grey == clear, 255, grey >> 8)
    assert np.array_equal(load(data[:at] + chunk + data[at:])[:, :, 0], expected)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_animations_yield_their_first_frame(kind):
    frames = [Image.fromarray(picture(seed)) for seed in (8, 9, 10)]
    if kind == "GIF":
        frames = [frame.quantize(64) for frame in frames]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(load(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_decode_has_the_size_rounded_up(factor):
    pixels = picture(10, 61, 83)
    found = load(jpeg(pixels), factor)
    assert found.shape == (-(-61 // factor), -(-83 // factor), 3)
    small = Image.fromarray(pixels).reduce(factor)
    assert difference(found, np.asarray(small)) < 4


def test_scratch_is_reused():
    scratch = Scratch()
    data = jpeg(picture(11))
    header = read_header(data, LIMIT)
    first = decode(data, header, scratch=scratch)
    second = decode(data, header, scratch=scratch)
    assert np.shares_memory(first, second)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_alike(orientation):
    """Bytes after the end send a JPEG to Pillow; also reduced, where the grid begins elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(picture(16, 61, 83)), "JPEG", quality=95, exif=exif)
    for factor in (1, 2, 4):
        ours, theirs = load(data, factor), load(data + b"tail" * 100, factor)
        assert ours.shape == theirs.shape
        assert difference(ours, theirs) < 1.5
        if factor == 1:
            assert difference(ours, theirs) < 0.5


def test_bytes_after_the_end_are_harmless():
    data = jpeg(picture(12))
    assert np.array_equal(load(data + b"tail" * 100), load(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(kind):
    data = jpeg(picture(13)) if kind == "JPEG" else encoded(picture(13), kind)
    for share in (0.2, 0.6, 0.9):
        with pytest.raises(DecodeError):
            load(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>not found</html>", bytes(1000)])
def test_what_is_not_an_image_is_refused(data):
    with pytest.raises(DecodeError, match="not a readable image"):
        load(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_before_they_are_decoded(kind):
    data = encoded(picture(14), kind)
    with pytest.raises(DecodeError, match="80 x 60 pixels exceeds max_pixels 4799"):
        read_header(data, 4799)
    assert read_header(data, 4800).width == 80


def test_floating_point_images_are_refused():
    data = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="range is not defined"):
        load(data)
