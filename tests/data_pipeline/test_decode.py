"""Decoding: every format in use, upright, RGB, or a clear refusal."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import DecodeError, Scratch, decode, jpeg_orientation, read_header
from tests.data_pipeline.photos import encoded, jpeg, picture

LIMIT = 10**6


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


def test_cmyk_jpeg_goes_through_pillow():
    data = saved(Image.fromarray(picture(3)).convert("CMYK"), "JPEG", quality=95)
    assert read_header(data, LIMIT).picture is not None
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(load(data), expected)


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


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16)
    found = load(encoded(ramp, "PNG"))
    assert np.array_equal(found, np.repeat((ramp >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_animation_yields_its_first_frame():
    frames = [Image.fromarray(picture(seed)) for seed in (8, 9)]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(load(data), picture(8))


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
