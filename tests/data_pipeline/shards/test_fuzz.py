"""Mutated tars, indices and manifests: what is right comes back, or a ShardError; nothing else.

Nothing else means no other exception, no wrong member, no endless loop and no memory beyond what
the files themselves have. Checksums and digests are mended after most mutations: without that
hardly any of them would get past the first check.
"""

import io
import json
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.shards import array_file, index
from data_pipeline.shards.bundles import head_line, sample_line
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import load_index, save_index
from data_pipeline.shards.manifest import FILE_NAME, Manifest
from data_pipeline.shards.shard_set import Shard, ShardSet
from data_pipeline.shards.tar import BLOCK, iter_members
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.shards.test_tar import make_tar
from tests.data_pipeline.small_shards import write_shards

MOST_MEMORY = 4_000_000
"""Bytes; the mutated files have less than 100,000."""

FIELDS = {
    "name": (0, 100),
    "size": (124, 136),
    "checksum": (148, 156),
    "kind": (156, 157),
    "magic": (257, 265),
    "prefix": (345, 500),
}
NUMBERS = [
    b"00000000000\0",
    b"-0000001000\0",
    b"+0000000001\0",
    b"0_000000001\0",
    b"77777777777\0",
    b"\x80" + 11 * b"\xff",
    b"\xff" * 12,
    b"           \0",
    b"00000001000 ",
]


@pytest.fixture(scope="module", params=[1, 4], ids=["plain", "bundled"])
def whole(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder, 6, 6, bundle=request.param)
    return folder


def mend_checksum(tar: bytearray, at: int) -> None:
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])


@st.composite
def mutated_tars(draw) -> tuple[bytes, list[tuple[str, bytes]]]:
    """A tar with up to three changes, most of them inside headers with right checksums."""
    long = "é" * 60 + "/"
    entries = [("a.jpg", b"\xff" * 700), (long * 2 + "b.json", b'{"x": 1}'), ("b.cls", b"7")]
    tar_format = draw(st.sampled_from([0, 1, 2]))  # ustar, GNU, pax
    entries = entries[:1] + entries[2:] if tar_format == 0 else entries
    tar = bytearray(make_tar(entries, tar_format))
    for _ in range(draw(st.integers(1, 3))):
        block = draw(st.integers(0, len(tar) // BLOCK - 1)) * BLOCK
        kind = draw(st.sampled_from(["field", "bytes", "cut", "repeat", "zero", "pax"]))
        if kind == "field":
            begin, end = FIELDS[draw(st.sampled_from(sorted(FIELDS)))]
            value = draw(st.one_of(st.sampled_from(NUMBERS), st.binary(max_size=end - begin)))
            tar[block + begin : block + end] = value[: end - begin].ljust(end - begin, b"\0")
            mend_checksum(tar, block)
        elif kind == "bytes":
            at = draw(st.integers(0, len(tar) - 1))
            tar[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
        elif kind == "cut":
            del tar[draw(st.integers(0, len(tar))) :]
        elif kind == "repeat":
            tar[block:block] = tar[block : block + BLOCK]
        elif kind == "zero":
            tar[block : block + BLOCK] = bytes(BLOCK)
        else:
            record = draw(
                st.sampled_from(
                    [
                        b"30 size=99999999999999999999999\n",
                        b"9 size=-1\n",
                        b"0 size=1\n",
                        b"12 path=../a\n",
                        b"11 size=1_0\n",
                    ]
                )
            )
            tar[block : block + BLOCK] = record.ljust(BLOCK, b"\0")
        if len(tar) < BLOCK:
            break
    return bytes(tar), entries


def limited(action):
    """What `action()` returns or raises; memory it took at most."""
    tracemalloc.start()
    try:
        return action()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY


@given(mutated_tars())
@settings(max_examples=400)
def test_mutated_tars(case):
    tar, _ = case
    try:
        members = limited(lambda: list(iter_members(io.BytesIO(tar), "x.tar", len(tar))))
    except ShardError as error:
        assert str(error).startswith("x.tar: ")
        return
    end = 0
    for member in members:  # side by side, inside the file, and in order
        assert end <= member.begin < member.offset <= member.offset + member.size <= len(tar)
        assert member.name and not member.name.startswith("/")
        end = member.end


@given(st.data())
@settings(max_examples=150)
def test_indexed_mutations_are_read_back_or_refused(tmp_path_factory, data):
    """Whatever gets an index can be read by it, every byte as it stands in the tar."""
    tar, _ = data.draw(mutated_tars())
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(tar)
    index_and_read(path)


def test_a_negative_size_does_not_lead_back():
    tar = bytearray(make_tar([("a.jpg", b"1"), ("b.jpg", b"2")]))
    tar[1024 + 124 : 1024 + 136] = b"-0000001000\0"
    mend_checksum(tar, 1024)
    with pytest.raises(ShardError, match=r"byte 1024: bad size field b'-0000001000"):
        list(iter_members(io.BytesIO(tar), "x.tar", len(tar)))


# ---- bundles -----------------------------------------------------------------------------------


LINES = [
    b'["a",{"jpg":[-5,0]}]',
    b'["a",{"jpg":[1e400,0]}]',
    b'["a",{"jpg":["1",0]}]',
    b'["a",{}]',
    b'["a",{"jpg":[true,0]}]',
    b'["../a",{"jpg":[0,0]}]',
    b'["a",{"jpg":[0]}]',
    b'{"a":1}',
    b'["\\ud800",{"jpg":[0,0]}]',
    b'["a",{"\\ud800":[0,0]}]',
    b'["a",{"jpg":[0,0]}]',
    b"[" * 3000,
    b'["a",{"jpg":[99999999999999999999,0]}]',
    b'["a",{"jpg":[' + b"9" * 5000 + b",0]}]",
    b"null",
    b'["a",{"jpg":[0,-1]}]',
    b'["",{"jpg":[0,0]}]',
    b'["a",{"JPG/..":[0,0]}]',
]


@given(st.data())
@settings(max_examples=250)
def test_mutated_bundles(tmp_path_factory, data):
    """As a member of a tar whose own headers are right: indexed and read back, or refused."""
    samples = [(f"k{n}", {"jpg": bytes([n]) * (40 + n), "cls": b"7"}) for n in range(4)]
    parts = [head_line(4)]
    for key, members in samples:
        parts += [sample_line(key, members), b"".join(members.values())]
    for _ in range(data.draw(st.integers(1, 2))):
        number = data.draw(st.integers(0, len(parts) - 1))
        kind = data.draw(st.sampled_from(["line", "bytes", "drop", "twice"]))
        if kind == "line":
            parts[number] = data.draw(st.sampled_from(LINES)) + b"\n"
        elif kind == "bytes":
            part = bytearray(parts[number])
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
            parts[number] = bytes(part)
        else:
            parts[number] *= 2 if kind == "twice" else 0
        if not parts[number]:
            break
    tar = make_tar([("0.bundle", b"".join(parts))])
    path = tmp_path_factory.mktemp("bundle") / "x.tar"
    path.write_bytes(tar)
    index_and_read(path)


@pytest.mark.parametrize("line", LINES)
def test_odd_lines_of_a_bundle(tmp_path, line):
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([("0.bundle", head_line(1) + line + b"\n")]))
    index_and_read(path)


def index_and_read(path: Path) -> None:
    """Index a tar and read all of it back as it stands there, or see it refused."""
    tar = path.read_bytes()
    try:
        built = limited(lambda: build_index(path))
        shards = ShardSet([Shard(str(path), len(built), built.shard_bytes, built.digest)])
    except ShardError as error:
        assert "x.tar: " in str(error) or "no samples" in str(error)
        return
    save_index(built, f"{path}.idx")
    with SampleReader(shards) as reader:
        for row in range(len(shards)):
            sample = reader.read(row)
            assert sample.key and not sample.key.startswith(("/", ".."))
            for extension, offset, size, *_ in built.members(row):
                assert sample.members[extension] == tar[offset : offset + size]


# ---- indices -------------------------------------------------------------------------------------


def write_index(path: Path, metadata: dict, arrays: dict) -> None:
    path.write_bytes(b"".join(array_file.serialise(metadata, arrays)))


def mended(metadata: dict, arrays: dict) -> dict:
    """The metadata with the digest that belongs to the arrays, as `ShardIndex` computes it."""
    rest = {name: value for name, value in metadata.items() if name != "digest"}
    digest = sha256(json.dumps(rest, sort_keys=True).encode())
    for name, values in array_file.in_file_order(arrays).items():
        digest.update(f"\n{name} {values.dtype.str} {len(values)}\n".encode() + values.tobytes())
    return rest | {"digest": digest.hexdigest()}


def read_all(folder: Path) -> None:
    """Open the shards anew and read all rows: bytes of the shard, or a named fault."""
    try:
        shards = ShardSet.open(folder)
    except ShardError as error:
        assert str(folder) in str(error)
        return
    tar = (folder / "train-000000.tar").read_bytes()
    with SampleReader(shards, retries=0) as reader:
        for row in range(len(shards)):
            try:
                sample = reader.read(row)
            except BadSample as bad:
                assert "train-000000.tar" in str(bad)
                continue
            assert sample.members and all(payload in tar for payload in sample.members.values())


@given(st.data())
@settings(max_examples=200)
def test_mutated_bytes_of_an_index(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("index")
    content = bytearray((whole / "train-000000.tar.idx").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["byte", "header", "cut", "length"]))
        if kind == "cut":
            del content[data.draw(st.integers(0, len(content))) :]
            break
        last = (header if kind == "header" else len(content)) - 1
        if kind == "length":
            content[:8] = data.draw(st.binary(min_size=8, max_size=8))
        else:
            content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    if bytes(content) == (whole / "train-000000.tar.idx").read_bytes():
        return
    path = folder / "train-000000.tar.idx"
    path.write_bytes(content)
    with pytest.raises(ShardError, match="damaged or foreign index"):
        limited(lambda: load_index(path))


@given(st.data())
@settings(max_examples=150)
def test_an_index_that_contradicts_itself_never_gives_wrong_bytes(whole, tmp_path_factory, data):
    """Arrays changed, and the digest made to fit: as a broken or hostile indexer would."""
    folder = tmp_path_factory.mktemp("index")
    for path in whole.iterdir():
        if path.name != FILE_NAME:
            (folder / path.name).write_bytes(path.read_bytes())
    place = folder / "train-000000.tar.idx"
    metadata, arrays = array_file.load(place)
    arrays = {name: values.copy() for name, values in arrays.items()}
    name = data.draw(st.sampled_from(sorted(index.ARRAYS)))
    values, limits = arrays[name], np.iinfo(arrays[name].dtype)
    if data.draw(st.booleans()):
        near = st.integers(0, 100) | st.integers(0, int(limits.max))
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(near)
    else:
        arrays[name] = values[: data.draw(st.integers(0, len(values)))]
    write_index(place, mended(metadata, arrays), arrays)
    limited(lambda: read_all(folder))


@pytest.mark.parametrize("value", ["[]", "{}", "null", "[1]", "-", '["a"', "1e400", "[" * 5000])
@pytest.mark.parametrize("name", ["extensions", "shard_bytes", "passed_over", "version"])
def test_odd_metadata_of_an_index(whole, tmp_path, name, value):
    metadata, arrays = array_file.load(whole / "train-000000.tar.idx")
    place = tmp_path / "x.tar.idx"
    write_index(place, mended(metadata | {name: value}, arrays), arrays)
    with pytest.raises(ShardError, match="damaged or foreign index"):
        load_index(place)


def test_a_json_key_that_utf8_cannot_hold_is_no_column(tmp_path):
    members = [("0.json", b'{"\\ud800": 1, "x": 2}')]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    assert list(build_index(tmp_path / "x.tar").columns) == ["x"]


# ---- manifests -----------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200)
def test_mutated_manifests(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("manifest")
    content = json.loads((whole / FILE_NAME).read_text(encoding="utf-8"))
    odd = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    target = data.draw(st.sampled_from([content, content["shards"][0]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(odd)
    text = json.dumps(content)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.text(max_size=3)) + text[at + 1 :]
    (folder / FILE_NAME).write_text(text, errors="surrogatepass", encoding="utf-8")
    try:
        manifest = limited(lambda: Manifest.load(folder))
    except ShardError as error:
        assert FILE_NAME in str(error)
        return
    for record in manifest.shards:
        assert record.samples >= 0 and "/" not in record.name


def test_a_deep_manifest(tmp_path):
    (tmp_path / FILE_NAME).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ShardError, match="damaged or foreign manifest"):
        Manifest.load(tmp_path)
