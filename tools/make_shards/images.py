"""An image on disk as the members of a sample: what all sources of make_shards have in common."""

import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.images.decode import MAX_PIXELS, ImageHeader, decode, largest_factor, read_header
from data_pipeline.images.formats import EXTENSIONS
from data_pipeline.plain_text import json_bytes
from data_pipeline.shards.packer import sample_bytes
from data_pipeline.shards.packing import SampleFault

OWN_COLUMNS = "columns"
"""Field of the json member with the columns of a table whose names are also names of ours."""
# Room for width, height and label, which are known only when the image is read.
_JSON_RESERVE = 128
_JPEG_QUALITY = 92


class ImageItem(NamedTuple):
    """One image on disk and what goes into its json member."""

    key: str
    path: str
    bytes: int
    record: dict[str, Any]
    label: int | None
    origin: str
    """Where it was asked for, for messages: "captions.json, image 785"."""
    begin: int | None = None
    """First byte of the image in the file at `path`; None: the file is the image."""
    base64: bool = False
    """Whether those bytes are base64 text."""
    size: tuple[int, int] | None = None
    """Width and height of the image that the annotations are for; None: they do not say."""

    @property
    def name(self) -> str:
        """Where it was asked for, and the file if that is another."""
        return f"{self.origin}: {self.path}"


@dataclass(frozen=True)
class BuildImage:
    """Makes the members of an ImageItem: the image as it is on disk, json, and cls if labelled."""

    short_side: int | None = None
    """Shrink so that the shorter side has this many pixels, and store as JPEG; None: copy bytes."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused, as the loader does with `image.max_pixels`."""

    def __call__(self, item: ImageItem) -> dict[str, bytes]:
        """Return the members. Errors: SampleFault if the file is missing or not an image."""
        image = store_image(item, self.short_side, self.max_pixels)
        size = image.size
        expected = item.size or size
        if expected != size and not (image.turned and expected == size[::-1]):
            raise SampleFault(
                f"{item.origin}: {item.path} has {size[0]} x {size[1]} pixels, but the annotations "
                f"are for {expected[0]} x {expected[1]}: not the same image"
            )
        width, height = expected if image.stored == size else image.stored
        record = {**item.record, "width": width, "height": height}
        if item.label is not None:
            record["label"] = item.label
        members = {image.extension: image.data, "json": json_bytes(record)}
        return members if item.label is None else members | {"cls": str(item.label).encode()}


class StoredImage(NamedTuple):
    """An image as a shard keeps it."""

    data: bytes
    extension: str
    size: tuple[int, int]
    """Width and height of the file, before an EXIF orientation is applied."""
    stored: tuple[int, int]
    """Width and height of `data`."""
    turned: bool
    """Whether the EXIF orientation of the file swaps width and height."""


def store_image(
    item: ImageItem, short_side: int | None, max_pixels: int = MAX_PIXELS
) -> StoredImage:
    """Read the image of an item as the loader reads it, and shrink it if `short_side` is given.

    Errors: SampleFault if the file is missing, not an image, damaged, or larger than `max_pixels`.
    """
    try:
        data = image_bytes(item)
        header = read_header(data, max_pixels)
        extension = EXTENSIONS.get(header.format)
        if extension is None:
            raise ValueError(f"format {header.format} is not supported")
        turned = header.orientation >= 5
        upright = header.width, header.height
        size = stored = upright[::-1] if turned else upright
        if short_side is not None and min(size) > short_side:
            data, stored = _shrunk(data, header, short_side)
            extension = "jpg"
        elif header.picture is not None:
            decode(data, header)  # not all that has a header can be brought to RGB
    except (OSError, ValueError) as error:
        raise SampleFault(f"{item.origin}: cannot use {item.path}: {error}") from None
    return StoredImage(data, extension, size, stored, turned)


def _shrunk(data: bytes, header: ImageHeader, short_side: int) -> tuple[bytes, tuple[int, int]]:
    """Return a JPEG and its size (width, height)."""
    shorter = min(header.width, header.height)
    # Twice the size, so that what the decoder drops is not seen after the resize.
    pixels = decode(data, header, largest_factor(header, shorter / (2 * short_side)))
    scale = short_side / shorter
    size = max(1, round(header.width * scale)), max(1, round(header.height * scale))
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), size


def image_bytes(item: ImageItem) -> bytes:
    """Return the bytes of an item's image.

    Errors: OSError; ValueError if there are none, fewer than `item.bytes`, or they are not base64.
    """
    with open(item.path, "rb") as file:
        file.seek(item.begin or 0)
        data = file.read() if item.begin is None else file.read(item.bytes)
    if not data:
        raise ValueError("the file is empty" if item.begin is None else "it has no bytes")
    if item.begin is not None and len(data) != item.bytes:
        raise ValueError(f"the file ends inside of it, at byte {item.begin + len(data)}")
    return binascii.a2b_base64(data, strict_mode=True) if item.base64 else data


def item_bytes(item: ImageItem, bundle: int = 1) -> int:
    """Return an upper bound of what the sample of an item takes in a tar."""
    json_size = len(json_bytes(item.record)) + _JSON_RESERVE
    return sample_bytes(item.key, {"jpeg": item.bytes, "json": json_size, "cls": 8}, bundle)


def beside_ours(ours: dict[str, Any], theirs: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return the record of a table's row: our fields, and all of theirs under their own names.

    Columns that are called as our fields are (`file`, `width`, `height`, and `more`) go into an
    object of their own, `columns`: neither displaces the other.
    """
    taken = {*ours, "file", "width", "height", OWN_COLUMNS, *more}
    own = {n: value for n, value in theirs.items() if n in taken and value is not None}
    rest = {name: value for name, value in theirs.items() if name not in taken}
    return {**ours, **rest, **({OWN_COLUMNS: own} if own else {})}
