"""A PNG without the texts and colour profiles that would stop Pillow from reading its pixels.

Pillow unpacks all texts and the profile of a PNG when it opens it, and refuses the file if one of
them has more than 1 MiB. Nothing of it is used here but an orientation.
"""

import struct
import zlib

_HEAD = struct.Struct(">I4s")
_SIGNATURE_BYTES, _AROUND_BYTES = 8, 12
_LARGEST_TEXT = 1 << 20
_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_ORIENTATIONS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def without_large_texts(data: bytes) -> bytes:
    """The same file without its profile, and of the texts only those that may say how the picture
    stands, if they are no larger than Pillow takes. What is no chunk is left as it is."""
    kept, begin, at = [], 0, _SIGNATURE_BYTES
    while at + _AROUND_BYTES <= len(data):
        size, kind = _HEAD.unpack_from(data, at)
        end = at + size + _AROUND_BYTES
        if end > len(data):
            break
        if kind == b"iCCP" or (kind in _TEXTS and not _is_needed(kind, data[at + 8 : end - 4])):
            kept.append(data[begin:at])
            begin = end
        at = end
    return b"".join((*kept, data[begin:])) if kept else data


def _is_needed(kind: bytes, text: bytes) -> bool:
    if not text.startswith(_ORIENTATIONS):
        return False
    packed = text.partition(b"\0")[2]
    if kind == b"iTXt":  # compressed or not, method, language, translated key word, text
        packed = packed.split(b"\0", 3)[-1] if packed[:1] == b"\1" else b""
    if kind == b"zTXt":
        packed = packed[1:]
    if kind == b"tEXt" or not packed:
        return len(text) <= _LARGEST_TEXT
    try:
        unpacker = zlib.decompressobj()
        return len(unpacker.decompress(packed, _LARGEST_TEXT)) < _LARGEST_TEXT
    except zlib.error:
        return False
