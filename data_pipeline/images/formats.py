"""The formats of images that are read here: told by content, and named in shards.

Of the other formats that Pillow opens, some start programs (EPS), and many have parsers that nobody
looks after; a member of a shard may claim to be any of them.
"""

import re

EXTENSIONS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "dib",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
    "QOI": "qoi",
    "MPO": "jpg",  # JPEG with further views behind it, from phones
}
"""Pillow's name of a format -> the extension under which `make_shards` stores it."""

PILLOW_FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")
"""What Pillow is asked to try; it finds MPO by way of JPEG."""

MEMBERS = list(dict.fromkeys(["jpg", "jpeg", "png", "webp", *EXTENSIONS.values(), "tiff"]))
"""Extensions of members that hold an image, the usual ones first."""

_NAMES = {*MEMBERS, "jpe", "jfif", "pgm", "pbm", "pnm", "j2k", "jpc", "jpf", "jpx"}
SUFFIXES = frozenset(f".{name}" for name in _NAMES)
"""Suffixes of files that say they hold an image of one of these formats."""

HEAD_BYTES = 32
_HEAD = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{12}[\x0c-\x7c]\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+"
    rb"|P[1-6]\s+(#|\d)|RIFF.{4}WEBP|qoif|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    rb"|.{4}ftyp(avif|avis|.{8}.{0,12}avi[fs])",
    re.DOTALL,
)


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes, HEAD_BYTES if it has them, is an image."""
    return _HEAD.match(head) is not None
