"""Decoding: every format in use, upright, RGB, or a clear refusal."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from data_pipeline.images.decode import DecodeError, Scratch, decode, read_header
from data_pipeline.images.jpeg_bytes import read_head
from tests.data_pipeline.photos import encoded, jpeg, picture

LIMIT = 10**6
GOLDENS = Path(__file__).parents[2] / "goldens"


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
        "JPEG",
        quality=98,
        subsampling=0,
    )
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


def exif_block(byte_order: str, kind: int, value: int, count: int = 1) -> bytes:
    """An EXIF segment's content that says nothing but an orientation."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, byte_order)

    field = {1: 1, 3: 2, 4: 4, 8: 2, 9: 4}[kind]
    entry = number(0x0112, 2) + number(kind, 2) + number(count, 4)
    entry += number(value, field) + bytes(4 - field)
    mark = b"II" if byte_order == "little" else b"MM"
    tiff = mark + number(42, 2) + number(8, 4) + number(1, 2) + entry + bytes(4)
    return b"Exif\0\0" + tiff


def xmp_block(form: str, value: int) -> bytes:
    text = f'tiff:Orientation="{value}"'
    if form == "element":
        text = f"><tiff:Orientation>{value}</tiff:Orientation"
    return b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf " + text.encode() + b"/></x:xmpmeta>"


def with_blocks(*blocks: bytes) -> bytes:
    data = jpeg(picture(5))
    parts = [b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block for block in blocks]
    return b"".join((data[:2], *parts, data[2:]))


@given(
    st.sampled_from(["little", "big"]),
    st.sampled_from([None, 1, 3, 4, 8, 9]),
    st.integers(0, 9),
    st.integers(1, 2),
    st.sampled_from([None, "attribute", "element"]),
    st.integers(0, 9),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_jpeg_stands_as_pillow_says(order, kind, value, count, form, other, exif_first):
    """EXIF as SHORT, as LONG or as something that does not count, XMP, both or neither."""
    blocks = [] if kind is None else [exif_block(order, kind, value, count)]
    blocks += [] if form is None else [xmp_block(form, other)]
    data = with_blocks(*(blocks if exif_first else blocks[::-1]))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    header = read_header(data, LIMIT)
    assert (header.width, header.height) == expected
    said = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
    assert header.orientation == (said if said in range(1, 9) else 1)


@pytest.mark.parametrize("block", [exif_block("big", 3, 6), xmp_block("element", 6)])
def test_damaged_exif_blocks_never_stop_anything(block):
    data = with_blocks(block)
    at = data.index(block) - 4
    for cut in range(len(block)):
        assert read_head(data[: at + cut] + data[at + len(block) + 4 :])[0] in range(1, 9)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_once(orientation, compression):
    """Pillow turns a TIFF by itself when it reads the pixels."""
    data = saved(
        Image.fromarray(picture(4)), "TIFF", compression=compression, tiffinfo={0x0112: orientation}
    )
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    header = read_header(data, LIMIT)
    assert (header.height, header.width) == upright.shape[:2]
    assert (header.orientation >= 5) == (orientation >= 5)
    assert np.array_equal(load(data), upright)
    straight = saved(Image.fromarray(picture(4)), "TIFF", compression=compression)
    assert np.array_equal(load(straight), picture(4))
    assert (orientation == 1) == np.array_equal(upright, picture(4))


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
def test_junk_in_the_header_changes_nothing(orientation):
    """Junk in the header has a JPEG read a second time; also reduced, where the grid begins
    elsewhere."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(picture(16, 61, 83)), "JPEG", quality=95, exif=exif)
    odd = data.replace(b"\xff\xdb", b"abc\xff\xdb", 1)
    for factor in (1, 2, 4):
        ours, theirs = load(data, factor), load(odd, factor)
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)


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


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint32, np.int16])
def test_samples_without_a_defined_range_are_refused(kind):
    data = cv2_tiff(np.full((4, 4), 100, kind))
    with pytest.raises(DecodeError, match="range is not defined"):
        load(data)


def cv2_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of one grey sample of any kind, which few encoders write."""
    form = {"f": 3, "i": 2, "u": 1}[pixels.dtype.kind]
    rows = pixels.tobytes()
    entries = {
        256: (4, pixels.shape[1]),
        257: (4, pixels.shape[0]),
        258: (3, 8 * pixels.itemsize),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, 1),
        278: (4, pixels.shape[0]),
        279: (4, len(rows)),
        339: (3, form),
    }
    folder = b"".join(struct.pack("<HHII", tag, k, 1, v) for tag, (k, v) in entries.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(rows))
    return head + rows + struct.pack("<H", len(entries)) + folder + bytes(4)


def test_white_may_be_zero_also_in_sixteen_bits():
    data = cv2_tiff(sixteen(1)[:, :, 0])
    negative = data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    assert np.array_equal(load(negative), 255 - load(data))


@pytest.mark.parametrize("profile", [False, True])
def test_a_png_with_megabytes_beside_its_pixels(profile):
    """Where it has a text, too, that says how it stands."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    if not profile:
        info.add_text("note", "x" * 2_000_000, zip=True)
        info.add_itxt("other", "x" * 2_000_000, zip=True)
    options = {"icc_profile": bytes(1_500_000)} if profile else {}
    data = saved(Image.fromarray(picture(3)), "PNG", pnginfo=info, **options)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(load(data), np.rot90(picture(3), -1))


def test_the_limit_of_pixels_is_that_of_the_settings():
    """Not Pillow's, which has another for other formats than JPEG."""
    for kind in ("PNG", "TIFF"):
        data = saved(Image.new("1", (20_000, 10_000)), kind)
        with pytest.raises(DecodeError, match="20000 x 10000 pixels exceeds"):
            read_header(data, 199_999_999)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_header(data, 200_000_000).width == 20_000
