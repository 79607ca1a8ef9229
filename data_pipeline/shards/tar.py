"""Walk over the headers of a tar file, trusting nothing.

Python's `tarfile` takes an invalid header in the middle of an archive for its end: samples vanish
without a word. Here every byte between the first header and the end of the file is accounted for:
a header with a wrong checksum, a cut payload, data behind the end-of-archive marker and a missing
marker are errors that name the shard and the byte. Reading 512-byte blocks directly is also several
times faster than building a `TarInfo` per member.

Understood: v7, ustar, GNU (long names, base-256 sizes) and pax (path, size) archives.
"""

import os
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from data_pipeline.storage.errors import ShardError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\x007"
_DIRECTORY = b"5"
_LONG_NAME, _LONG_LINK = b"L", b"K"
_PAX, _PAX_GLOBAL = b"x", b"g"
_VOLUME_LABEL = b"V"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"M": "a continuation of another volume",
    b"S": "a sparse file",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Extended headers hold one name and a few numbers; more is damage or an attack on memory.
_LARGEST_EXTENDED_HEADER = 1 << 20
# Digits of the largest size that a 64-bit offset can reach.
_SIZE_DIGITS = 19


class Member(NamedTuple):
    """One regular file inside a tar; offsets and sizes in bytes from the start of the tar."""

    name: str
    begin: int
    """First byte of its first header block, extended headers included."""
    offset: int
    """First byte of the payload; the 512-byte header with name and size ends here."""
    size: int
    header_crc32: int
    """crc32 of the 512 bytes before `offset`."""

    @property
    def end(self) -> int:
        """First byte behind the payload and its padding."""
        return self.offset + padded(self.size)


class Header(NamedTuple):
    """The fields of one 512-byte header block that matter here."""

    name: str
    size: int
    kind: bytes


@dataclass(slots=True)
class _Extended:
    """What extended headers in front of a member say about it."""

    begin: int
    name: str | None = None
    size: int | None = None


def padded(size: int) -> int:
    """Round `size` up to whole 512-byte blocks."""
    return -(-size // BLOCK) * BLOCK


def iter_members(file: BinaryIO, shard: str, total: int, start: int = 0) -> Iterator[Member]:
    """Yield the regular files of a tar in order; `file` stands at the payload at each yield.

    The caller may read the payload or not. Directories and volume labels are passed over.

    Args: file: seekable, opened for reading; shard: name for messages; total: file size; start:
    byte of the first header.
    Errors: ShardError for any damage, an unsafe name, or a member that is not a plain file.
    """
    position = start
    extended: _Extended | None = None
    while True:
        block = _read(file, position, BLOCK, shard, total)
        if position == 0:
            _refuse_compressed(block, shard)
        if block == _ZEROS:
            if extended is not None:
                raise _damage(shard, position, "the archive ends behind an extended header")
            _check_rest_is_zero(file, position, shard)
            return
        header = parse_header(block, shard, position)
        payload = position + BLOCK
        size = header.size
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            data = _read_extended(file, payload, size, shard, total)
            extended = extended or _Extended(position)
            _apply_extended(extended, header.kind, data, shard, position)
            if header.kind == _PAX_GLOBAL:
                extended = None
            position = payload + padded(size)
            continue
        name, begin = header.name, position
        if extended is not None:
            name = header.name if extended.name is None else extended.name
            size = size if extended.size is None else extended.size
            begin, extended = extended.begin, None
        if _is_plain_file(header.kind, name, shard, position):
            if payload + size > total:
                raise _damage(
                    shard,
                    position,
                    f"member {name!r} needs {size} bytes but the file ends at byte {total}: "
                    "truncated" + _saved(shard),
                )
            yield Member(name, begin, payload, size, zlib.crc32(block))
        else:
            size = 0  # directories have no payload, whatever the size field says
        position = payload + padded(size)
        file.seek(position)


def parse_header(block: bytes, shard: str, at: int) -> Header:
    """Decode one 512-byte header block found at byte `at` of `shard`.

    Errors: ShardError if the checksum or a number field is wrong.
    """
    stored = _number(block[148:156], shard, at, "checksum")
    if stored != sum(block[:148]) + 256 + sum(block[156:]) and stored != _signed_sum(block):
        raise _damage(
            shard,
            at,
            "this is not a tar header (its checksum is wrong): damaged" + _saved(shard),
        )
    name = block[:100].split(b"\0", 1)[0]
    # GNU archives have "ustar  " here and use the prefix field for something else.
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return Header(_text(name), _number(block[124:136], shard, at, "size"), block[156:157])


def check_name(name: str, shard: str, at: int) -> None:
    """Refuse member names that could leave the folder they are unpacked in.

    Errors: ShardError for empty, absolute and `..` names.
    """
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise _damage(
            shard, at, f"unsafe member name {name!r}: empty, absolute or with '..' is refused"
        )


def _refuse_compressed(block: bytes, shard: str) -> None:
    for start, name in _COMPRESSED.items():
        if block.startswith(start):
            raise ShardError(
                f"{shard}: is compressed ({name}), so single samples cannot be read: unpack it to "
                "a plain tar (images hardly shrink anyway)"
            )


def _is_plain_file(kind: bytes, name: str, shard: str, at: int) -> bool:
    check_name(name, shard, at)
    if kind in _REFUSED:
        raise _damage(shard, at, f"member {name!r} is {_REFUSED[kind]}: only plain files are read")
    if kind in (_DIRECTORY, _VOLUME_LABEL):
        return False
    if kind not in _REGULAR:
        raise _damage(shard, at, f"member {name!r} is of the unknown type {kind!r}")
    return not name.endswith("/")  # v7 archives mark directories by the slash only


def _read(file: BinaryIO, position: int, size: int, shard: str, total: int) -> bytes:
    if position == total:
        raise _damage(
            shard,
            total,
            "the file ends without an end-of-archive marker: truncated or not a tar"
            + _saved(shard),
        )
    file.seek(position)
    data = file.read(size)
    if len(data) != size:
        raise _damage(
            shard,
            position,
            f"the file ends at byte {total} inside a header: truncated" + _saved(shard),
        )
    return data


def _read_extended(file: BinaryIO, at: int, size: int, shard: str, total: int) -> bytes:
    if size > _LARGEST_EXTENDED_HEADER:
        raise _damage(shard, at, f"an extended header of {size} bytes is refused")
    return _read(file, at, size, shard, total) if size else b""


def _apply_extended(
    extended: _Extended, kind: bytes, data: bytes, shard: str, position: int
) -> None:
    if kind == _LONG_NAME:
        extended.name = _text(data.split(b"\0", 1)[0])
        return
    if kind == _LONG_LINK:
        return  # its link follows, and is refused there
    for keyword, value in _pax_records(data, shard, position):
        if keyword.startswith(b"GNU.sparse"):
            raise _damage(shard, position, "sparse files are refused")
        if kind == _PAX_GLOBAL and keyword in (b"path", b"size"):
            raise _damage(shard, position, f"a global {_text(keyword)!r} is refused")
        if keyword == b"path":
            extended.name = _text(value)
        elif keyword == b"size":
            if not value.isdigit() or len(value) > _SIZE_DIGITS:
                raise _damage(shard, position, f"pax size {value[:40]!r} is not a size")
            extended.size = int(value)


def _pax_records(data: bytes, shard: str, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Split pax data into records `"<length> <keyword>=<value>\\n"`; length counts the record."""
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + 20)
        digits = data[start:space] if space > 0 else b""
        end = start + int(digits) if digits.isdigit() else 0
        equals = data.find(b"=", space, end)
        if end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
            raise _damage(shard, at, "malformed pax header: damaged")
        yield data[space + 1 : equals], data[equals + 1 : end - 1]
        start = end


def _check_rest_is_zero(file: BinaryIO, position: int, shard: str) -> None:
    marker = position
    file.seek(position)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            at = position + len(chunk) - len(chunk.lstrip(b"\0"))
            error = _damage(
                shard,
                at,
                f"data behind the end-of-archive marker at byte {marker}: a header was "
                "overwritten with zeros, or archives were concatenated" + _saved(shard),
            )
            error.marker = marker
            raise error
        position += len(chunk)


def _number(field: bytes, shard: str, at: int, what: str) -> int:
    if field[0] == 0x80:  # GNU: too large for octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    # Not left to int(): it reads signs and underscores too, and a negative size leads back.
    if digits.strip(b"01234567"):
        raise _damage(
            shard, at, f"bad {what} field {field!r} in a tar header: damaged" + _saved(shard)
        )
    return int(digits, 8) if digits else 0


def _signed_sum(block: bytes) -> int:
    """Checksum as computed by some old tars that summed signed characters."""
    return 256 + sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])


def _text(name: bytes) -> str:
    # Names that are not UTF-8 stay distinct and printable; they only serve as keys.
    return name.decode("utf-8", "backslashreplace")


def _damage(shard: str, at: int, what: str) -> ShardError:
    error = ShardError(f"{shard}: byte {at}: {what}")
    error.at = at
    return error


def _saved(shard: str) -> str:
    """How to go on with a damaged tar."""
    local = shard if "://" not in shard else os.path.basename(shard)
    return (
        ("; what is whole" if local is shard else "; download it, and what is whole")
        + f" is saved by `python -m tools.shards repack {shlex.quote(local)} --out saved "
        "--on-damage skip --on-clash prefix`"
    )
