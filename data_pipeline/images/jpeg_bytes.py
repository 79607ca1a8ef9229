"""The bytes of a JPEG: its segments, its orientation, and the same picture in plain bytes.

The decoder that is used stops at everything odd, which is what finds damage. `plain_forms` tells
what is odd and harmless from it: junk between the segments of the header, segments that are of no
use here, values of a header that say nothing about the pixels, and bytes between the last pixel and
the end marker. Damage among the coded pixels is never taken out.
"""

import re
import struct
from collections.abc import Iterator

import numpy as np

from data_pipeline.images.jpeg_scan import without_rest, zeros_are_flat

_SOS, _EOI, _APP0, _APP1, _APP14, _COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
_SEQUENTIAL = (0xC0, 0xC1)
_ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD8)))
# Ends a scan: a marker that is neither a stuffed 0xFF nor a restart.
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION_TAG = 0x0112
_HIGH_BITS, _WORDS_IN_A_ROW = np.uint64(0x8080808080808080), b"\1" * 3
_EACH = 4  # one word of four is looked at: a stretch of 128 bytes holds three of them
# Codes of flat areas repeat a few bytes, which may all be letters.
_TEXT, _LETTERS = re.compile(rb"[\t\n\r\x20-\x7e]{64,}"), 10
_ZEROS = bytes(64)
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF types SHORT, LONG and their signed forms


def read_head(data: bytes) -> tuple[int, int]:
    """What stands in front of the pixels of a JPEG.

    Returns:
        Its orientation: that of EXIF, 1 to 8; that of XMP if EXIF has none; 1 if neither can be
        read. Pillow reads both in the same way. And where the coded pixels begin.
    """
    exif, xmp, pixels = b"", b"", len(data)
    for marker, begin, end in _segments(data, 2):
        if marker == _APP1:
            if data.startswith(_EXIF, begin + 4):
                exif += data[begin + 4 + len(_EXIF) : end]
            elif data.startswith(_XMP, begin + 4):
                xmp = data[begin + 4 + len(_XMP) : end]
        if marker == _SOS:
            pixels = end
            break
    value = _tiff_orientation(exif)
    if value is None and (found := _XMP_ORIENTATION.search(xmp)):
        value = int(found[1])
    return (value if value in range(1, 9) else 1), pixels


def strange_stretch(data: bytes, begin: int) -> str | None:
    """Say what lies among the coded pixels, from byte `begin` on, that no encoder writes there.

    A page of text, or zeros from a file that was never filled: the usual damage, of which a decoder
    makes blocks as of anything else. Looked for without decoding, in stretches of 128 bytes: coded
    pixels have hardly ever as many with no byte of 0x80 or more.
    """
    begin += -begin % 8
    count = max(len(data) - begin, 0) // 8
    if count < _EACH:
        return None
    words = np.frombuffer(data, np.uint64, count, begin)[::_EACH]
    if ((words & _HIGH_BITS) == 0).tobytes().find(_WORDS_IN_A_ROW) < 0:
        return None
    fault = None
    for form in plain_forms(data):  # without what lies behind the pixels, which may be anything
        fault = _strange_bytes(form)
        if fault is None:
            break
    return fault


def _strange_bytes(form: bytes) -> str | None:
    coded = form[read_head(form)[1] :]
    for found in _TEXT.finditer(coded):
        if len(set(found[0])) >= _LETTERS:
            return "text among its pixels"
    if _ZEROS in coded and not zeros_are_flat(form):
        return "zeros among its pixels"
    return None


def plain_forms(data: bytes) -> Iterator[bytes]:
    """Files with the same coded pixels and nothing odd: with all bytes up to the end marker, then
    without those that lie between the last pixel and the end marker, if there are any.

    A file that has no end marker is cut, and has none of these forms; nor has one with bytes that
    belong to nothing behind its first scan: they may be a further scan, whose head is lost.
    """
    header, scans = [b"\xff\xd8"], []
    sequential, behind = False, None  # where the next segment has to begin
    for marker, begin, end in _segments(data, 2):
        if behind is not None and data[behind:begin].strip(b"\xff"):
            return
        if marker == _EOI:
            yield b"".join((*header, *scans, b"\xff\xd9"))
            if scans and (shorter := without_rest(b"".join(header), scans[-1])) is not None:
                yield b"".join((*header, *scans[:-1], shorter, b"\xff\xd9"))
            return
        sequential = sequential or marker in _SEQUENTIAL
        header += scans
        header.append(_plain_segment(marker, data[begin:end], sequential))
        scans = []
        if marker == _SOS:
            found = _NEXT_MARKER.search(data, end)
            scans = [data[end : found.start()]] if found else []
            behind = found.start() if found else len(data)
        elif behind is not None:
            behind = end


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte, and byte behind each segment; what lies between them is passed over, as
    libjpeg does it. The end marker comes last, and stands for itself."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 2 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            end = at + 2 if marker == _EOI else at + 2 + length
            yield marker, at, end
            if marker == _EOI or length < 2:
                return
            at = end
            if marker == _SOS:
                found = _NEXT_MARKER.search(data, end)
                at = found.start() if found else len(data)


def _plain_segment(marker: int, segment: bytes, sequential: bool) -> bytes:
    """A segment of the header without what is of no use, or only makes the decoder warn."""
    if marker == _APP0 and segment[4:9] == b"JFIF\0":
        return segment[:9] + b"\1" + segment[10:]  # the version
    if marker == _APP14 and segment[4:9] == b"Adobe":
        known = segment[15:16] in (b"\0", b"\1", b"\2")
        return segment if known else segment[:15] + b"\1" + segment[16:]  # luminance and colours
    if _APP0 <= marker <= 0xEF or marker == _COM:
        return b""
    if marker == _SOS and sequential:
        return segment[:-3] + b"\0\x3f\0"  # which coefficients: all of them
    return segment


def _tiff_orientation(block: bytes) -> int | None:
    """What the first folder of an EXIF block says; None if it says nothing, 0 if nonsense."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    value = None
    if order is None:
        return value
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for entry in range(entries):
            at = start + 2 + 12 * entry
            tag, kind, count = struct.unpack_from(order + "HHI", block, at)
            if tag == _ORIENTATION_TAG:
                layout = _INTEGERS.get(kind) if count else None
                place = at + 8
                if layout and count * struct.calcsize(order + layout) > 4:  # it lies elsewhere
                    (place,) = struct.unpack_from(order + "I", block, place)
                value = struct.unpack_from(order + layout, block, place)[0] if layout else 0
    except struct.error:
        pass  # cut: what was read holds
    return value
