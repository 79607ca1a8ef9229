"""Many tiny samples in one member of a tar."""

import io
import json
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.reading.webdataset_reader import ShardFault, streamed_samples
from data_pipeline.shards import bundles
from data_pipeline.shards.index import index_path
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import load_index
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.packer import ShardFile, ShardWriter, sample_bytes
from data_pipeline.shards.packing import pack
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.shards.verify import verify_shard
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.shards.test_packing import contents, job
from tests.data_pipeline.small_shards import sample, write_shards
from tools.support.range_server import RangeServer


def write_bundles(folder: Path, bundle: int = 4) -> ShardSet:
    return write_shards(folder, 10, 10, bundle=bundle)


def split_by_hand(data: bytes) -> dict[str, dict[str, bytes]]:
    """What the format page says, without any code of ours."""
    head, _, data = data.partition(b"\n")
    found = {}
    for _ in range(json.loads(head)["samples"]):
        line, _, data = data.partition(b"\n")
        key, members = json.loads(line)
        found[key] = {}
        for extension, (size, crc32) in members.items():
            found[key][extension], data = data[:size], data[size:]
            assert zlib.crc32(found[key][extension]) == crc32
    assert not data
    return found


def test_samples_come_back_and_any_reader_can_unpack_them(tmp_path):
    shards = write_bundles(tmp_path)
    with SampleReader(shards) as reader:
        for row in range(10):
            key, members = sample(row)
            found = reader.read(row)
            assert (found.key, found.members) == (key, members)
            assert reader.read(row, {"cls"}).members == {"cls": members["cls"]}
    path = shards.shards[0].path
    with tarfile.open(path) as tar:
        assert [m.name for m in tar] == ["000000.bundle", "000001.bundle", "000002.bundle"]
        data = [tar.extractfile(m).read() for m in tar]
    assert [len(split_by_hand(d)) for d in data] == [4, 4, 2]
    assert split_by_hand(data[2])["000009"] == sample(9)[1]
    theirs = webdataset.WebDataset([path], shardshuffle=False)
    assert [s["bundle"] for s in theirs] == data


def test_index_columns_and_counts_are_those_of_plain_samples(tmp_path):
    bundled = write_bundles(tmp_path / "bundled").index(0)
    plain = write_bundles(tmp_path / "plain", bundle=1).index(0)
    assert bundled.bundled and not plain.bundled
    assert bundled.keys() == plain.keys()
    assert bundled.extension_counts() == plain.extension_counts()
    assert {n: c.tolist() for n, c in bundled.columns.items() if n != "score"} == {
        n: c.tolist() for n, c in plain.columns.items() if n != "score"
    }
    again = build_index(tmp_path / "bundled" / "train-000000.tar")
    assert again.digest == bundled.digest
    assert load_index(index_path(tmp_path / "bundled" / "train-000000.tar")).bundled


def test_a_bundle_of_tiny_images_takes_a_fraction_of_the_room(tmp_path):
    members = {"png": bytes(1000), "json": b'{"label":3,"width":32,"height":32}', "cls": b"3"}
    sizes = []
    for bundle in (1, 64):
        shard = ShardFile(tmp_path / f"{bundle}.tar", bundle)
        for number in range(64):
            shard.add(f"{number:06d}", members)
        sizes.append(shard.commit().record.bytes)
        bound = sample_bytes("000000", {e: len(p) for e, p in members.items()}, bundle)
        assert 64 * bound + 1024 >= sizes[-1]
    assert sizes[1] < 1.15 * 64 * 1035 < sizes[0] / 2.5


def test_the_writer_keeps_to_its_limits(tmp_path):
    with ShardWriter(tmp_path, max_bytes=5000, bundle=3) as writer:
        for number in range(12):
            writer.write(*sample(number))
    records = Manifest.load(tmp_path).shards
    assert len(records) > 1 and max(record.bytes for record in records) <= 5000
    assert ShardSet.open(tmp_path).index(0).bundled


def test_packing_bundles_is_reproducible_and_resumes(tmp_path):
    pack(job(tmp_path / "one", bundle=3), processes=1)
    whole = contents(tmp_path / "one")
    pack(job(tmp_path / "two", bundle=3), processes=2)
    assert contents(tmp_path / "two") == whole
    shutil.copytree(tmp_path / "one", tmp_path / "killed")
    (tmp_path / "killed" / "train-000003.tar").unlink()
    assert pack(job(tmp_path / "killed", bundle=3)).reused_shards == 4
    assert contents(tmp_path / "killed") == whole
    with pytest.raises(FileExistsError, match="another packing"):
        pack(job(tmp_path / "one", bundle=2))


def test_no_flipped_bit_passes(tmp_path):
    """Flips anywhere: verify sees each, and reading gives the sample or says that it is bad."""
    shards = write_bundles(tmp_path)
    path = Path(shards.shards[0].path)
    whole = path.read_bytes()
    index = load_index(index_path(path))
    chosen = random.Random(3)
    for byte in [*range(512, 640), *chosen.sample(range(len(whole) - 1024), 150)]:
        data = bytearray(whole)
        data[byte] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        report = verify_shard(str(path), index)
        assert not report.intact or report.sha256 != shards_sha256(tmp_path), byte
        inside = [r for r in range(10) if index.span(r)[0] <= byte < index.span(r)[1]]
        assert sorted(report.damaged) == [index.key(r) for r in inside]
        with SampleReader(shards) as reader:
            for row in range(10):
                if row in inside:
                    with pytest.raises(BadSample, match=index.key(row)):
                        reader.read(row)
                else:
                    assert reader.read(row).members == sample(row)[1]


def shards_sha256(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["shards"][0]["sha256"]


def test_a_cut_shard_is_named(tmp_path):
    shards = write_bundles(tmp_path)
    path = Path(shards.shards[0].path)
    index = shards.index(0)
    path.write_bytes(path.read_bytes()[:4000])
    report = verify_shard(str(path), index)
    assert report.faults and "000009" in report.damaged
    with pytest.raises(BadSample, match="truncated or replaced"):
        SampleReader(ShardSet(shards.shards)).read(0)


def write_tar(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, payload in entries:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def bundle_of(*keys: str) -> bytes:
    body = b"".join(bundles.sample_line(key, {"txt": b"x"}) + b"x" for key in keys)
    return bundles.head_line(len(keys)) + body


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("0.bundle", bundle_of("a")), ("b.txt", b"x")], "either bundles or plain members"),
        ([("0.bundle", bundle_of("../a"))], "unsafe member name '../a'"),
        ([("0.bundle", bundle_of("a")[:-1])], "cut inside of sample 'a'"),
        ([("0.bundle", bundle_of("a") + b"y")], "1 bytes behind its last sample"),
        ([("0.bundle", bundle_of("a")[:-1] + b"y")], "member .txt is damaged"),
        ([("0.bundle", bundles.head_line(2))], "no line of a bundle"),
        ([("0.bundle", bundles.head_line(1).replace(b":1,", b":9,"))], "another version"),
        ([("0.bundle", bundles.head_line(1) + b'["a",{"txt":[-5,1]}]\n')], "bad size or crc32"),
        ([("0.bundle", bundles.head_line(1) + b'["a",{}]\n')], "no key or no members"),
    ],
)
def test_damaged_bundles_are_refused(tmp_path, entries, message):
    with pytest.raises(ShardError, match=message):
        build_index(write_tar(tmp_path / "x.tar", entries))


def test_members_of_others_that_end_in_bundle_stay_members(tmp_path):
    index = build_index(write_tar(tmp_path / "x.tar", [("a.bundle", b"{}"), ("a.txt", b"x")]))
    assert not index.bundled and index.extension_counts() == {"bundle": 1, "txt": 1}


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 60))
def test_no_bytes_crash_the_parser(junk, at, cut):
    data = bundle_of("a", "b/c", "d")
    data = data[:at] + junk + data[at + cut :]
    try:
        samples = list(bundles.iter_samples(data, "x.tar"))
    except ShardError:
        return
    begin = data.index(b"\n") + 1
    for found in samples:
        assert found.begin == begin
        begin = found.end
        for member in found.members:
            payload = data[member.offset : member.offset + member.size]
            assert (len(payload), zlib.crc32(payload)) == (member.size, member.crc32)
    assert begin == len(data)


def test_the_packer_refuses_what_would_be_taken_for_a_bundle(tmp_path):
    shard = ShardFile(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="is for bundles"):
        shard.add("a", {"bundle": b""})
    shard.discard()
    with pytest.raises(ValueError, match="bundle 0"):
        ShardFile(tmp_path / "y.tar", 0)


@pytest.mark.parametrize("indexed", [True, False])
def test_bundles_behind_a_server_and_in_a_stream(tmp_path, monkeypatch, indexed):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    local = write_bundles(tmp_path / "set")
    if not indexed:
        for path in (*(tmp_path / "set").glob("*.idx"), tmp_path / "set" / "manifest.json"):
            path.unlink()
    with RangeServer(tmp_path / "set") as server:
        shards = ShardSet.open(f"{server.url}/train-000000.tar")
        with SampleReader(shards) as reader:
            found = [reader.read(row) for row in range(len(shards))]
        # Bundles have their checksums with them: their headers tell all that an index knows.
        assert shards.fingerprint == shards.fingerprint_by_headers() == local.fingerprint
    streamed = list(streamed_samples(str(tmp_path / "set" / "train-000000.tar"), 0))
    for samples in (found, streamed):
        assert [(s.key, s.members) for s in samples] == [sample(n) for n in range(10)]


def test_a_damaged_bundle_ends_a_stream(tmp_path):
    path = Path(write_bundles(tmp_path).shards[0].path)
    data = bytearray(path.read_bytes())
    data[900] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardFault, match="is damaged"):
        list(streamed_samples(str(path), 0))
