"""Bundles: many tiny samples in one member of a tar.

A tar spends 512 bytes of header and up to 511 of padding on every member, which is more than a tiny
image has. A member `000000.bundle` holds samples back to back instead. Its first line names the
format; then each sample is one line that gives its key and the size and crc32 of its members,
followed by their bytes in that order, without padding:

    {"format":"omnipretrain.bundle","version":1,"samples":64}
    ["cat/1",{"png":[2311,3632233996],"json":[41,907060870],"cls":[1,4108050209]}]
    <2311 bytes><41 bytes><1 byte>["cat/2",...

Any tar reader unpacks the member; `iter_samples` below is all that is needed to read it.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from data_pipeline.shards.tar import BLOCK, check_name
from data_pipeline.storage.errors import ShardError

EXTENSION = "bundle"
FORMAT = "omnipretrain.bundle"
VERSION = 1
MAX_BYTES = 1 << 28
"""A larger member is no bundle of tiny samples; it would be read into memory whole."""

LONGEST_HEAD = 200
"""The first line of a bundle has at most so many bytes."""

_START = b'{"format":"' + FORMAT.encode() + b'"'
LONGEST_LINE = 1 << 20
START_BYTES = len(_START)
"""So many bytes of a member tell whether it is a bundle."""


class BundledMember(NamedTuple):
    """One member of a bundled sample; `offset` counts from the first byte of the bundle."""

    extension: str
    offset: int
    size: int
    crc32: int


class BundledSample(NamedTuple):
    """One sample of a bundle; offsets count from the first byte of the bundle."""

    key: str
    begin: int
    """First byte of the line that describes it."""
    line_crc32: int
    """Of that line, line feed included; it ends where the first member begins."""
    members: list[BundledMember]

    @property
    def end(self) -> int:
        """First byte behind its last member."""
        return self.members[-1].offset + self.members[-1].size


def is_bundle(extension: str, start: bytes) -> bool:
    """Whether a member is a bundle, from its extension and its first START_BYTES bytes."""
    return extension == EXTENSION and start.startswith(_START)


def head_line(samples: int) -> bytes:
    """Return the first line of a bundle."""
    return _line({"format": FORMAT, "version": VERSION, "samples": samples})


def sample_line(key: str, members: Mapping[str, bytes]) -> bytes:
    """Return the line in front of a sample's bytes."""
    table = {name: [len(data), zlib.crc32(data)] for name, data in members.items()}
    return _line([key, table])


def bundled_bytes(key: str, sizes: Mapping[str, int], per_bundle: int) -> int:
    """Return an upper bound of what a sample takes in a tar, with its share of the bundle's own."""
    line = len(_line([key, {name: [size, 2**32 - 1] for name, size in sizes.items()}]))
    shared = 2 * BLOCK + len(head_line(per_bundle))
    return line + sum(sizes.values()) + shared // per_bundle + 1


def iter_samples(payload: bytes, place: str) -> Iterator[BundledSample]:
    """Yield the samples of a bundle, each after its checksums were compared.

    Args: payload: the whole member; place: shard and byte, for messages.
    Errors: ShardError for damage, unsafe keys, or another version.
    """
    begin, samples = read_head(payload[:LONGEST_HEAD], place)
    for _ in range(samples):
        line = _line_at(payload, begin, place)
        sample = _sample(line, begin, place)
        check_name(sample.key, place, begin)
        if sample.end > len(payload):
            raise ShardError(f"{place}: bundle is cut inside of sample {sample.key!r}")
        for extension, offset, size, crc32 in sample.members:
            if zlib.crc32(payload[offset : offset + size]) != crc32:
                raise ShardError(f"{place}: sample {sample.key!r}: member .{extension} is damaged")
        yield sample
        begin = sample.end
    if begin != len(payload):
        raise ShardError(f"{place}: bundle has {len(payload) - begin} bytes behind its last sample")


def read_head(start: bytes, place: str) -> tuple[int, int]:
    """Return where the first line of a bundle ends, and how many samples it promises.

    Args: start: the first LONGEST_HEAD bytes of the bundle.
    Errors: ShardError if it is damaged or of another version.
    """
    line = _line_at(start, 0, place)
    try:
        head = json.loads(line)
        known = head["format"] == FORMAT and head["version"] == VERSION
        samples = head["samples"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known, samples = False, None
    if not known or type(samples) is not int or samples < 0:
        raise ShardError(f"{place}: damaged bundle, or one of another version: {line[:80]!r}")
    return len(line), samples


def _line(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _line_at(payload: bytes, begin: int, place: str) -> bytes:
    end = payload.find(b"\n", begin, begin + LONGEST_LINE)
    if end < 0:
        raise ShardError(f"{place}: no line of a bundle at its byte {begin}: damaged or cut")
    return payload[begin : end + 1]


def _sample(line: bytes, begin: int, place: str) -> BundledSample:
    try:
        key, table = json.loads(line)
        if not isinstance(key, str) or not table:
            raise ValueError("no key or no members")
        key.encode()
        members, offset = [], begin + len(line)
        for extension, (size, crc32) in table.items():
            if type(size) is not int or type(crc32) is not int or size < 0:
                raise ValueError(f"bad size or crc32 of .{extension}")
            members.append(BundledMember(extension, offset, size, crc32))
            offset += size
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{place}: damaged line of a bundle at its byte {begin}: {error}"
        ) from None
    return BundledSample(key, begin, zlib.crc32(line), members)
