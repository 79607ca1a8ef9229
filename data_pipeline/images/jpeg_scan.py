"""Where the coded pixels of a JPEG end: told by walking through its Huffman codes.

Needed for the rare file with bytes between its last pixel and its end marker. They are harmless if
somebody wrote them there, and the sign of damage if they are pixels that found no place any more: a
damaged stretch was read as more blocks than it had been. Two things tell the one from the other:

- An encoder fills the last byte with ones. Behind damage the last block ends at any bit.
- Pixels that found no place are blocks, and fill their last byte with ones. Read as blocks, other
  bytes hardly ever end so.
"""

import re
from dataclasses import dataclass, field

import numpy as np

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_COEFFICIENTS = 64
# So few bytes are passed over however they look: a register of bits that an encoder wrote whole.
_REGISTER_BYTES = 4
_HUFFMAN_FRAMES = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass
class _Header:
    """What the segments in front of the last scan say of it."""

    height: int = 0
    width: int = 0
    sequential: bool = False
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Component -> horizontal and vertical factor."""
    tables: dict[int, list[int]] = field(default_factory=dict)
    """Class (0: DC, 16: AC) + number -> what the next 16 bits mean: bits to pass << 8 | how many
    coefficients they stand for; 0 for no code."""
    restart: int = 0
    scan: list[tuple[int, int]] = field(default_factory=list)
    """Component and its numbers of tables, of the last scan."""


def without_rest(header: bytes, scan: bytes) -> bytes | None:
    """The last scan of a JPEG up to its last pixel, if what follows there is harmless.

    Args: header: the file up to the scan, without junk; scan: the bytes up to the end marker.
    Returns: None if nothing follows, if it may be pixels, or if the file is of a kind that is not
    walked through (progressive, arithmetic).
    """
    try:
        found = _read_header(header)
        if not found.sequential:
            return None
        last = [match.end() for match in _RESTART.finditer(scan)]
        begin = last[-1] if last else 0
        count = _units(found) - len(last) * found.restart
        if count <= 0:
            return None
        coded = scan[begin:].replace(b"\xff\0", b"\xff")
        end = _end_of_pixels(coded, _blocks(found), count)
    except (IndexError, KeyError, ZeroDivisionError):  # a header that contradicts itself
        return None
    if end is None or end == len(coded):
        return None
    return scan[:begin] + coded[:end].replace(b"\xff", b"\xff\0")


def zeros_are_flat(data: bytes) -> bool:
    """Whether a run of zeros can be pixels: those of a flat area, in a file whose code for the end
    of a block is zeros; or in a progressive one. In others it is coefficients of -1 without end.

    Args: data: a JPEG without junk.
    """
    try:
        found = _read_header(data)
        blocks = _blocks(found) if found.sequential else []
    except (IndexError, KeyError):
        return True
    return all(ac[0] & 0xFF == _COEFFICIENTS for _, ac in blocks)


def _end_of_pixels(
    coded: bytes, blocks: list[tuple[list[int], list[int]]], count: int
) -> int | None:
    """Byte behind the last pixel; None if what follows may be pixels."""
    size = 8 * len(coded)
    padded = np.frombuffer(coded + bytes(16), np.uint8).astype(np.uint32)
    words = (padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]).tolist()
    at = 0
    for _ in range(count):
        at = _walk(words, size, blocks, at)
        if at is None:
            return None
    end = -(-at // 8)
    if len(coded) - end <= _REGISTER_BYTES:
        return end
    if not _ones(coded, at) or coded[end - 4 : end] == coded[end : end + 4]:
        return None
    while (at := _walk(words, size, blocks, at)) is not None:
        if size - at < 8 and _ones(coded, at):
            return None
    return end


def _walk(
    words: list[int], size: int, blocks: list[tuple[list[int], list[int]]], at: int
) -> int | None:
    """The bit behind the blocks that begin at bit `at`; None if they do not end, or are none."""
    for dc, ac in blocks:
        if at >= size:
            return None
        entry = dc[words[at >> 3] >> (8 - (at & 7)) & 0xFFFF]
        if not entry:
            return None
        at += entry >> 8
        number = 1
        while number < _COEFFICIENTS:
            if at >= size:
                return None
            entry = ac[words[at >> 3] >> (8 - (at & 7)) & 0xFFFF]
            if not entry:
                return None
            at += entry >> 8
            number += entry & 0xFF
    return at if at <= size else None


def _ones(coded: bytes, at: int) -> bool:
    """Whether the bits from `at` to the end of its byte are ones."""
    rest = -at % 8
    return rest == 0 or coded[at >> 3] & ((1 << rest) - 1) == (1 << rest) - 1


def _read_header(header: bytes) -> _Header:
    found, at = _Header(), 2
    while at < len(header):
        marker, length = header[at + 1], int.from_bytes(header[at + 2 : at + 4], "big")
        body = header[at + 4 : at + 2 + length]
        if marker in _FRAMES:
            found.sequential = marker in _HUFFMAN_FRAMES
            found.height, found.width = (int.from_bytes(body[i : i + 2], "big") for i in (1, 3))
            found.sampling = {
                body[i]: (body[i + 1] >> 4, body[i + 1] & 15) for i in range(6, 6 + 3 * body[5], 3)
            }
        elif marker == 0xC4:
            _read_tables(body, found.tables)
        elif marker == 0xDD:
            found.restart = int.from_bytes(body[:2], "big")
        elif marker == 0xDA:
            found.scan = [(body[i], body[i + 1]) for i in range(1, 1 + 2 * body[0], 2)]
        at += 2 + length
        if marker == 0xDA:  # on to what follows the pixels of an earlier scan
            match = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]").search(header, at)
            at = match.start() if match else len(header)
    return found


def _read_tables(body: bytes, tables: dict[int, list[int]]) -> None:
    at = 0
    while at + 17 <= len(body):
        number, counts = body[at], body[at + 1 : at + 17]
        at += 17
        table, code = [0] * (1 << 16), 0
        for length, count in enumerate(counts, 1):
            for symbol in body[at : at + count]:
                run, size = (0, symbol & 15) if number < 16 else (symbol >> 4, symbol & 15)
                passed = run + 1
                if number >= 16 and size == 0:
                    passed = 16 if run == 15 else _COEFFICIENTS  # zeros; end of the block
                span = 1 << (16 - length)
                table[code * span : (code + 1) * span] = [(length + size) << 8 | passed] * span
                code += 1
            at += count
            code *= 2
        tables[number] = table


def _units(found: _Header) -> int:
    """How many groups of blocks the last scan has."""
    most_h = max(h for h, _ in found.sampling.values())
    most_v = max(v for _, v in found.sampling.values())
    if len(found.scan) > 1:
        return -(-found.width // (8 * most_h)) * -(-found.height // (8 * most_v))
    h, v = found.sampling[found.scan[0][0]]
    return -(-found.width * h // (8 * most_h)) * -(-found.height * v // (8 * most_v))


def _blocks(found: _Header) -> list[tuple[list[int], list[int]]]:
    """Tables for DC and AC of each block of a group."""
    return [
        (found.tables[numbers >> 4], found.tables[16 + (numbers & 15)])
        for component, numbers in found.scan
        for _ in range(
            found.sampling[component][0] * found.sampling[component][1]
            if len(found.scan) > 1
            else 1
        )
    ]
