"""Headers are read as tarfile reads them; whatever is damaged or unsafe is refused, none
crashes."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.tar import BLOCK, iter_members
from data_pipeline.storage.errors import ShardError


def members_of(data: bytes) -> list[tuple[str, bytes]]:
    file = io.BytesIO(data)
    return [
        (m.name, data[m.offset : m.offset + m.size]) for m in iter_members(file, "x.tar", len(data))
    ]


def make_tar(entries: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, encoding="utf-8") as tar:
        for name, payload in entries:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def make_special(kind: bytes, name: str = "a.jpg") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = "elsewhere"
        tar.addfile(info)
    return buffer.getvalue()


names = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"),
    min_size=1,
    max_size=90,
).filter(lambda name: name not in (".", ".."))
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


@given(
    st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=150, deadline=None)
def test_same_members_as_tarfile_for_any_names(entries, tar_format):
    data = make_tar(entries, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    assert members_of(data) == expected


def test_member_positions_include_extended_headers():
    data = make_tar([("a.txt", b"1"), ("b" * 150 + ".txt", b"22")], tarfile.GNU_FORMAT)
    first, second = iter_members(io.BytesIO(data), "x.tar", len(data))
    assert (first.begin, first.offset, first.end) == (0, BLOCK, 2 * BLOCK)
    # Long name: its header and its payload, then the header of the member.
    assert (second.begin, second.offset) == (2 * BLOCK, 5 * BLOCK)


def test_ustar_prefix_is_joined():
    name = "folder/" * 20 + "a.jpg"
    assert members_of(make_tar([(name, b"x")])) == [(name, b"x")]


@pytest.mark.parametrize(
    ("tar_format", "folder"),
    [
        ("gnu", "deep" * 30 + "/" + "er" * 40),
        ("oldgnu", "deep" * 30 + "/" + "er" * 40),
        ("posix", "deep" * 30 + "/" + "er" * 40),
        ("ustar", "deep" * 20 + "/" + "er" * 20),
        ("v7", "flat"),
    ],
)
def test_archives_of_gnu_tar(tmp_path, tar_format, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "a.jpg").write_bytes(b"")
    (tmp_path / folder / "b.jpg").write_bytes(b"payload" * 200)
    top = folder.split("/")[0]
    command = ["tar", f"--format={tar_format}", "--sort=name", "-cf", "x.tar", top]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert members_of((tmp_path / "x.tar").read_bytes()) == [
        (f"{folder}/a.jpg", b""),
        (f"{folder}/b.jpg", b"payload" * 200),
    ]


def test_sizes_in_base_256():
    data = bytearray(make_tar([("a.bin", b"12345")]))
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    assert members_of(bytes(data)) == [("a.bin", b"12345")]


def test_pax_size_larger_than_the_octal_field_allows():
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 << 30
    header = info.tobuf(tarfile.PAX_FORMAT)
    total = len(header) + (9 << 30) + 2 * BLOCK

    class Sparse(io.RawIOBase):
        position = 0

        def seek(self, position, whence=0):
            self.position = position
            return position

        def read(self, size=-1):
            size = min(size, total - self.position)
            data = header[self.position : self.position + size]
            self.position += size
            return data + bytes(size - len(data))

    (member,) = iter_members(Sparse(), "x.tar", total)
    assert (member.name, member.size) == ("huge.bin", 9 << 30)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        b"S",
        b"?",
    ],
)
def test_anything_but_plain_files_is_refused(kind):
    with pytest.raises(ShardError, match=r"x\.tar: byte 0: member 'a\.jpg' is "):
        members_of(make_special(kind))


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../a.jpg", "a/../../b.jpg", "x/.."])
def test_unsafe_names_are_refused(name):
    with pytest.raises(ShardError, match="unsafe member name"):
        members_of(make_tar([(name, b"")], tarfile.PAX_FORMAT))


def test_unsafe_long_names_are_refused():
    with pytest.raises(ShardError, match="unsafe member name"):
        members_of(make_tar([("../" + "a" * 200 + ".jpg", b"")], tarfile.GNU_FORMAT))


def test_directories_are_passed_over():
    data = make_special(tarfile.DIRTYPE, "folder")
    assert members_of(data) == []


def three_members() -> bytes:
    return make_tar([(f"{n}.jpg", bytes([n]) * 700) for n in (1, 2, 3)])


@pytest.mark.parametrize("byte", [0, 50, 124, 130, 148, 156, 257, 511])
def test_a_flipped_bit_in_a_header_names_the_byte(byte):
    data = bytearray(three_members())
    second = BLOCK + 2 * BLOCK  # behind the first header and its padded payload
    data[second + byte] ^= 1
    with pytest.raises(ShardError, match=rf"x\.tar: byte {second}: "):
        members_of(bytes(data))


def test_a_zeroed_header_is_not_the_end():
    data = bytearray(three_members())
    second = 3 * BLOCK
    data[second : second + BLOCK] = bytes(BLOCK)
    with pytest.raises(ShardError, match=f"byte {second + BLOCK}: data behind the end-of-archive"):
        members_of(bytes(data))


def test_concatenated_archives_are_refused():
    with pytest.raises(ShardError, match="concatenated"):
        members_of(three_members() + three_members())


def test_every_truncation_is_an_error():
    data = three_members()
    end_of_members = 9 * BLOCK
    for size in range(0, end_of_members + BLOCK, 64):
        with pytest.raises(ShardError, match=r"x\.tar: byte \d+: "):
            members_of(data[:size])


@pytest.mark.parametrize(
    ("compress", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_compressed_archives_are_refused(compress, name):
    noise = bytes(range(256)) * 9
    with pytest.raises(ShardError, match=rf"x\.tar: is compressed \({name}\).* unpack it"):
        members_of(compress(make_tar([("a.jpg", noise)])) + noise)


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_garbage_is_an_error_and_nothing_else(data):
    try:
        found = members_of(data)
    except ShardError:
        return
    assert found == [] and not data.strip(b"\0")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_extended_headers_never_crash(data):
    tar_format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    tar = bytearray(make_tar([("é" * 70 + ".jpg", b"x" * 10)], tar_format))
    for _ in range(data.draw(st.integers(1, 4))):
        tar[data.draw(st.integers(0, 4 * BLOCK - 1))] = data.draw(st.integers(0, 255))
    try:
        members_of(bytes(tar))
    except ShardError as error:
        assert "x.tar: byte " in str(error)
