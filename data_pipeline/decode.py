"""Encoded image bytes to an RGB uint8 array.

Plain JPEGs go through libjpeg-turbo (simplejpeg), straight into a buffer that the caller may reuse;
everything else, and what simplejpeg finds suspicious, through Pillow. Both paths turn the picture
upright by its EXIF orientation. Transparency is laid over white, 16 bits become 8 by dropping the
low byte, animations yield their first frame.

Of an upright JPEG only the window that is asked for is decoded, with the same pixels, where pip
could compile jpeg_window.c; else all of it.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from data_pipeline.crops import Box
from data_pipeline.image_formats import PILLOW_FORMATS

try:
    from data_pipeline import _jpeg_window
except ImportError:
    _jpeg_window = None

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")
_ORIENTATION_TAG = 0x0112
_DCT_FACTORS = (8, 4, 2)


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
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, KeyError):  # a KeyError for 4:4:1, which it has no name for
            colorspace = None  # let Pillow judge
        if colorspace in _PLAIN_COLORSPACES:
            _refuse_bomb(width, height, max_pixels)
            return _upright(height, width, jpeg_orientation(data), None)
    return _pillow_header(data, max_pixels)


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
        # A file that is cut is caught here, also where the cut lies below the window.
        if data.endswith(_JPEG_END) and _jpeg_window.decode(data, buffer, factor, *window):
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


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 if it has none or its EXIF block cannot be read."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        if marker == 0xDA or length < 2:  # pixels begin: no EXIF block can follow
            return 1
        at += 2 + length
    return 1


def _tiff_orientation(block: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for entry in range(entries):
            tag, kind, _ = struct.unpack_from(order + "HHI", block, start + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG and kind == 3:
                (value,) = struct.unpack_from(order + "H", block, start + 10 + 12 * entry)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


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
        return _decode_pillow(header.picture, header.orientation)
    try:
        pixels = _decode_jpeg(data, header, factor, scratch)
    except ValueError:
        # Strict mode also stops at harmless warnings (bytes after the end, odd marker lengths).
        # Pillow lives with those, and reports what is truly cut or damaged.
        return _decode_pillow(_open(data), header.orientation, factor)
    return _apply_orientation(pixels, header.orientation)


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
    orientation = orientation if orientation in range(1, 9) else 1
    return _upright(picture.height, picture.width, orientation, picture)


def _decode_pillow(picture: ImageFile.ImageFile, orientation: int, factor: int = 1) -> np.ndarray:
    try:
        picture.load()
        rgb = _to_rgb(picture)
        if factor > 1:
            rgb = rgb.reduce(factor)
        return _apply_orientation(np.asarray(rgb), orientation)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"damaged {picture.format} image: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        values = np.asarray(picture, dtype=np.int64)
        high_bytes = np.clip(values >> 8, 0, 255)
        if isinstance(clear := picture.info.get("transparency"), int):
            high_bytes[values == clear] = 255
        picture = Image.fromarray(high_bytes.astype(np.uint8))
    elif mode == "F":
        raise DecodeError("floating-point image: its range is not defined")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")
