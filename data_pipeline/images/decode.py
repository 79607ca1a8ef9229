"""Encoded image bytes to an RGB uint8 array.

Plain JPEGs go through libjpeg-turbo (simplejpeg), straight into a buffer that the caller may reuse;
everything else through Pillow. Both paths turn the picture upright by its EXIF orientation, or that
of its XMP. Transparency is laid over white, 16 bits become 8 by dropping the low byte, animations
yield their first frame; what has no range that is defined is refused. Packers and the loader read
images here and nowhere else, so that they mean the same picture.

A decoder of JPEGs makes pixels of whatever it is given, and only warns. What it warns of is damage,
but for what `jpeg_bytes.plain_forms` can take out.

Of an upright JPEG only the window that is asked for is decoded, with the same pixels, where pip
could compile jpeg_window.c; else all of it.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from data_pipeline.images.crops import Box
from data_pipeline.images.formats import PILLOW_FORMATS
from data_pipeline.images.jpeg_bytes import plain_forms, read_head, strange_stretch
from data_pipeline.images.png_bytes import without_large_texts

try:
    from data_pipeline.images import _jpeg_window
except ImportError:
    _jpeg_window = None

_T = TypeVar("_T")
_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")
_ORIENTATION_TAG = 0x0112
# Of TIFF files: bits of a sample, whether black is the largest value, and what a sample is.
_BITS_TAG, _PHOTOMETRIC_TAG, _FORMAT_TAG = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_DCT_FACTORS = (8, 4, 2)

MAX_PIXELS = 89_000_000
"""The largest image that is read, where nothing else is said; for all formats alike."""


class DecodeError(ValueError):
    """The bytes are not an image that can be used; the text says why."""


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image before it is decoded."""

    height: int
    """Upright height in pixels: EXIF orientation is taken into account."""
    width: int
    """Upright width in pixels."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    picture: ImageFile.ImageFile | None
    """Opened by Pillow; none for a plain JPEG."""

    @property
    def format(self) -> str:
        """The name that Pillow has for the format of the file."""
        return "JPEG" if self.picture is None else str(self.picture.format)


class Scratch:
    """A buffer that grows to the largest image seen, so that decoding touches no fresh memory."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> np.ndarray:
        """(>= size,) uint8; the next call may hand out the same memory."""
        if self._bytes.size < size:
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes


def has_windows() -> bool:
    """Whether the decoder of windows was compiled at installation, and is in use."""
    return _jpeg_window is not None


def without_windows() -> None:
    """Decode whole images from now on in this process: what an installation without it does."""
    global _jpeg_window
    _jpeg_window = None


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Size and orientation, without decoding pixels.

    Raises:
        DecodeError: not an image, damaged, or larger than `max_pixels`.
    """
    if data.startswith(_JPEG_START):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError):  # a KeyError for 4:4:1, which it has no name for
            colorspace = None  # let Pillow judge
        if colorspace in _PLAIN_COLORSPACES:
            _refuse_bomb(width, height, max_pixels)
            return _upright(height, width, _jpeg_orientation(data), None)
    header = _pillow_header(data, max_pixels)
    if header.format in ("JPEG", "MPO"):
        _jpeg_orientation(data)
    return header


def decode(
    data: bytes,
    header: ImageHeader,
    factor: int = 1,
    scratch: Scratch | None = None,
    window: Box | None = None,
) -> np.ndarray:
    """Decode to upright RGB.

    Args:
        data: encoded image; header: from `read_header` of the same bytes.
        factor: 1, 2, 4 or 8: decode at ceil(size / factor), for plain JPEGs only
            (`largest_factor` returns 1 for the others). Each pixel stands for factor x factor
            pixels of the grid that `grid_origin` begins; those at an edge may be cut.
        scratch: where a plain JPEG's pixels go; the result then lives until the next call with it.
        window: the pixels, of those decoded at 1 / factor, that are wanted; none for all.

    Returns:
        (H, W, 3) uint8, of the window if there is one; a view with negative or swapped strides if
        the orientation is not 1.

    Raises:
        DecodeError: truncated or otherwise damaged.
    """
    if window is None:
        return _decode_all(data, header, factor, scratch)
    x, y, width, height = window
    if _jpeg_window is not None and header.picture is None and header.orientation == 1:
        buffer = (Scratch() if scratch is None else scratch).take(height * width * 3)
        if _jpeg_window.decode(data, buffer, factor, *window):
            return buffer[: height * width * 3].reshape(height, width, 3)
    pixels = _decode_all(data, header, factor, scratch)
    return pixels[y : y + height, x : x + width]


def largest_factor(header: ImageHeader, limit: float) -> int:
    """Largest of 1, 2, 4, 8 that `decode` can reduce this image by and that is at most `limit`."""
    if header.picture is not None:
        return 1
    return next((factor for factor in _DCT_FACTORS if factor <= limit), 1)


def grid_origin(header: ImageHeader, factor: int) -> tuple[int, int]:
    """x and y, 0 to factor - 1, of the first line of the grid of pixels decoded at 1 / factor.

    JPEGs are reduced before they are turned upright: where that mirrors an axis, the pixel that is
    cut by the edge of the image comes first.
    """
    flip_rows, flip_columns = _mirrored(header.orientation)
    return (
        header.width % factor if flip_columns else 0,
        header.height % factor if flip_rows else 0,
    )


def _jpeg_orientation(data: bytes) -> int:
    """Raises DecodeError if something lies among the pixels that are none."""
    orientation, pixels = read_head(data)
    if (found := strange_stretch(data, pixels)) is not None:
        raise DecodeError(f"damaged JPEG image: {found}")
    return orientation


def _upright(
    height: int, width: int, orientation: int, picture: ImageFile.ImageFile | None
) -> ImageHeader:
    if orientation >= 5:
        height, width = width, height
    return ImageHeader(height, width, orientation, picture)


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(f"image of {width} x {height} pixels exceeds max_pixels {max_pixels}")


def _decode_all(
    data: bytes, header: ImageHeader, factor: int, scratch: Scratch | None
) -> np.ndarray:
    if header.picture is not None:
        if header.format in ("JPEG", "MPO"):
            _strictly(data, _check_jpeg)
        return _decode_pillow(header)
    pixels = _strictly(data, lambda form: _decode_jpeg(form, header, factor, scratch))
    return _apply_orientation(pixels, header.orientation)


def _strictly(data: bytes, read: Callable[[bytes], _T]) -> _T:
    """Read a JPEG by a decoder that stops at all that is odd; what is harmless is then taken out.

    Raises DecodeError if what is left is still odd: the file is damaged.
    """
    try:
        return read(data)
    except ValueError as error:
        fault = error
    for form in plain_forms(data):
        try:
            return read(form)
        except ValueError as error:
            fault = error
    raise DecodeError(f"damaged JPEG image: {fault}") from fault


def _check_jpeg(data: bytes) -> None:
    """Read all coefficients, and as few pixels as can be, of a JPEG that Pillow will decode: it
    says nothing of damage. Raises ValueError."""
    simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)


def _decode_jpeg(
    data: bytes, header: ImageHeader, factor: int, scratch: Scratch | None
) -> np.ndarray:
    height, width = header.height, header.width
    if header.orientation >= 5:
        height, width = width, height
    height, width = -(-height // factor), -(-width // factor)
    buffer = None if scratch is None else scratch.take(height * width * 3)
    # The smallest scale that reaches these bounds is exactly 1 / factor.
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=height, min_width=width, min_factor=factor, buffer=buffer
    )


def _apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF: 2-4 mirror or turn by 180 degrees, 5-8 the same after swapping the axes."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flip_rows, flip_columns = _mirrored(orientation)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _mirrored(orientation: int) -> tuple[bool, bool]:
    """Whether the rows and the columns of the upright image run backwards in the stored one."""
    return orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def _open(data: bytes) -> ImageFile.ImageFile:
    # Ours, `max_pixels`, holds for all formats and is known; Pillow's would refuse what it allows.
    Image.MAX_IMAGE_PIXELS = None
    if data.startswith(_PNG_START):
        data = without_large_texts(data)
    try:
        return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:  # its text names a memory address, different in every process
        raise DecodeError("not a readable image: of no known format") from None
    except Exception as error:  # Pillow's plug-ins raise whatever their parsers meet
        raise DecodeError(f"not a readable image: {error}") from error


def _pillow_header(data: bytes, max_pixels: int) -> ImageHeader:
    picture = _open(data)
    _refuse_bomb(*picture.size, max_pixels)
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block does not make the pixels unusable
        orientation = 1
    if not isinstance(orientation, int) or orientation not in range(1, 9):
        orientation = 1
    if picture.format == "TIFF":
        # Pillow turns these by itself, and knows the new size before if the file's own tag says so.
        tag = picture.tag_v2.get(_ORIENTATION_TAG)
        if tag in (5, 6, 7, 8):
            return ImageHeader(picture.height, picture.width, tag, picture)
    return _upright(picture.height, picture.width, orientation, picture)


def _decode_pillow(header: ImageHeader) -> np.ndarray:
    picture = header.picture
    try:
        picture.load()
        pixels = np.asarray(_to_rgb(picture))
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"damaged {picture.format} image: {error}") from error
    if picture.format != "TIFF":
        pixels = _apply_orientation(pixels, header.orientation)
    if pixels.shape[:2] != (header.height, header.width):
        raise DecodeError(
            f"damaged {picture.format} image: {pixels.shape[1]} x {pixels.shape[0]} pixels, where "
            f"its header says {header.width} x {header.height}"
        )
    return pixels


def _to_rgb(picture: ImageFile.ImageFile) -> Image.Image:
    """RGB of 8 bits; DecodeError for what has no range that would say how."""
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    kinds = tags.get(_FORMAT_TAG, _UNSIGNED)
    # Of 32 bits are also the samples of PPM files, which Pillow has brought to 16.
    wide = picture.mode == "I" and picture.format == "TIFF"
    if picture.mode == "F":
        raise DecodeError("floating-point image: its range is not defined")
    if wide or set(kinds if isinstance(kinds, tuple) else (kinds,)) != {_UNSIGNED}:
        raise DecodeError("image of signed or 32-bit samples: its range is not defined")
    image: Image.Image = picture
    if image.mode.startswith("I"):  # Pillow's own conversion clips instead of scaling
        image = _high_bytes(picture, tags)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_bytes(picture: ImageFile.ImageFile, tags: dict[int, Any]) -> Image.Image:
    """Grey of 8 bits, of 16 or of the 12 that a TIFF may have."""
    bits = tags.get(_BITS_TAG, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    values = np.asarray(picture, dtype=np.int64)
    high = np.clip(values >> (bits - 8), 0, 255)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        high = 255 - high
    if isinstance(clear := picture.info.get("transparency"), int):
        high[values == clear] = 255
    return Image.fromarray(high.astype(np.uint8))
