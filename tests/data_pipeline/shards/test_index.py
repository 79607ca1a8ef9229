"""An index says where every member lies and finds any changed bit, whoever wrote the tar."""

import io
import json
import struct
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from webdataset.tariterators import base_plus_ext

from data_pipeline.shards.index import MAX_COLUMNS, index_path, split_name
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import load_index, save_index
from data_pipeline.shards.shard_set import ShardSet, load_or_build_index
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.small_shards import sample, write_shards


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, payload in entries:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


@given(st.text("ab./_ _XÉ", max_size=14))
def test_names_split_as_webdataset_splits_them(name):
    key, extension = base_plus_ext(name)
    ours = split_name(name)
    if ours is None and (name.startswith("__") or name.split("/")[-1].startswith(".")):
        return  # see test_files_that_belong_to_no_sample
    assert ours == (None if key is None else (key, extension.lower()))


def test_index_of_the_writer_equals_the_index_of_a_pass(tmp_path):
    write_shards(tmp_path, 30, 30)
    shard = tmp_path / "train-000000.tar"
    written = index_path(shard).read_bytes()
    save_index(build_index(shard), tmp_path / "again.idx")
    assert (tmp_path / "again.idx").read_bytes() == written


def test_index_says_where_everything_is(tmp_path):
    write_shards(tmp_path, 20, 20)
    shard = tmp_path / "train-000000.tar"
    index = load_index(index_path(shard))
    data = shard.read_bytes()
    assert index.keys() == [sample(n)[0] for n in range(20)]
    for row in range(20):
        key, members = sample(row)
        assert index.key(row) == key
        found = {e: data[offset : offset + size] for e, offset, size, _, _ in index.members(row)}
        assert found == members
        begin, end = index.span(row)
        assert data[begin : begin + len(key)] == key.encode()
        assert end % 512 == 0
    assert index.span(0)[0] == 0 and index.span(19)[1] == len(data) - 1024
    assert index.extension_counts() == {"jpg": 20, "json": 20, "cls": 20}


def test_columns(tmp_path):
    write_shards(tmp_path, 9, 9)
    columns = load_index(tmp_path / "train-000000.tar.idx").columns
    assert columns["width"].dtype == np.int64
    np.testing.assert_array_equal(columns["width"], 10 + np.arange(9))
    np.testing.assert_array_equal(columns["captions.count"], np.arange(9) % 4)
    np.testing.assert_array_equal(columns["cls"], np.arange(9) % 5)
    # 0 / 3 is written as 0.0: still a float column.
    np.testing.assert_allclose(columns["score"], np.arange(9) / 3)


def test_columns_with_holes_and_odd_json(tmp_path):
    records = [
        b'{"a": 1, "yes": true, "name": "x"}',
        b"not json",
        b'{"a": 10000000000000000000000000000}',
        b"[1, 2]",
        b'{"a": NaN, "big": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
    ]
    index = build_index(
        write_tar(tmp_path / "x.tar", [(f"{n}.json", r) for n, r in enumerate(records)])
    )
    assert set(index.columns) == {"a", "big"}
    np.testing.assert_array_equal(index.columns["a"], [1, np.nan, 1e28, np.nan, np.nan, np.nan])
    assert index.columns["big"][4] == np.inf


def test_the_number_of_columns_is_bounded(tmp_path):
    record = json.dumps({f"n{n:03d}": n for n in range(MAX_COLUMNS + 7)}).encode()
    index = build_index(write_tar(tmp_path / "x.tar", [("0.json", record)]))
    assert len(index.columns) == MAX_COLUMNS and index.dropped_columns == 7


def test_safetensors_reads_our_index(tmp_path):
    shards = write_shards(tmp_path, 11, 11)
    theirs = load_file(tmp_path / "train-000000.tar.idx")
    ours = shards.index(0)
    columns = {f"column:{name}" for name in ours.columns}
    columns |= {f"derived:{name}" for name in ours.derived.columns}
    assert set(theirs) == set(ours.arrays) | columns
    for name, values in ours.arrays.items():
        np.testing.assert_array_equal(theirs[name], values)


def test_digest_tells_shards_apart_that_differ_in_one_bit(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"aaaa")])
    write_tar(tmp_path / "b.tar", [("0.jpg", b"aaab")])
    write_tar(tmp_path / "c.tar", [("1.jpg", b"aaaa")])
    digests = {build_index(tmp_path / f"{n}.tar").digest for n in "abc"}
    assert len(digests) == 3


def test_any_flipped_bit_in_an_index_is_found(tmp_path):
    write_shards(tmp_path, 3, 3)
    path = tmp_path / "train-000000.tar.idx"
    whole = path.read_bytes()
    load_index(path)
    rng = np.random.default_rng(0)
    for byte in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            index = load_index(path)
        except ShardError as error:
            assert str(path) in str(error)
        else:  # a bit without meaning: padding of the header, or letter case of an escape
            path.write_bytes(whole)
            assert index.digest == load_index(path).digest


@pytest.mark.parametrize("size", [0, 5, 8, 100, 1000, -1])
def test_truncated_index(tmp_path, size):
    write_shards(tmp_path, 3, 3)
    path = tmp_path / "train-000000.tar.idx"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"000000\.tar\.idx: damaged or foreign index"):
        load_index(path)


def test_shards_of_webdatasets_own_writer(tmp_path):
    path = tmp_path / "wds.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(7):
            writer.write({"__key__": f"dir.x/s{number}", "PNG": b"p" * number, "seg.png": b"q"})
    index = build_index(path)
    assert index.keys() == [f"dir.x/s{n}" for n in range(7)]
    assert [m[0] for m in index.members(3)] == ["png", "seg.png"]
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in theirs] == index.keys()


def test_files_that_belong_to_no_sample(tmp_path):
    entries = [
        ("README", b""),
        (".hidden", b""),
        ("__meta__/info.json", b"{}"),
        ("__x__", b""),
        ("a.jpg", b"1"),
        ("b/c.jpg", b"2"),
    ]
    path = write_tar(tmp_path / "x.tar", entries)
    index = build_index(path)
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    assert index.keys() == [s["__key__"] for s in theirs] == ["a", "b/c"]
    assert index.passed_over == 4


def test_hidden_files_in_folders_are_no_samples(tmp_path):
    names = ["b/._c.jpg", "b/.DS_Store", "b/c.jpg"]
    index = build_index(write_tar(tmp_path / "x.tar", [(name, b"") for name in names]))
    assert (index.keys(), index.passed_over) == (["b/c"], 2)


def test_a_sample_in_two_pieces_is_refused(tmp_path):
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt"]
    path = write_tar(tmp_path / "x.tar", [(n, b"") for n in names])
    with pytest.raises(ShardError, match=r"x\.tar: byte 1024: .*'a' are not beside each other"):
        build_index(path)


def test_a_repeated_sample_is_two_samples_as_in_webdataset(tmp_path):
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"]
    path = write_tar(tmp_path / "x.tar", [(n, b"") for n in names])
    assert build_index(path).keys() == ["a", "b", "a"]


def test_the_same_member_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("a.JPG", b"")])
    with pytest.raises(ShardError, match=r"'a\.JPG' appears twice"):
        build_index(path)


def test_empty_shard(tmp_path):
    index = build_index(write_tar(tmp_path / "x.tar", []))
    save_index(index, tmp_path / "x.tar.idx")
    assert len(load_index(tmp_path / "x.tar.idx")) == 0


def test_progress_adds_up_to_the_size(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes(700_000)) for n in range(5)])
    passed = []
    build_index(path, passed.append)
    assert sum(passed) == path.stat().st_size and len(passed) >= 3


@pytest.mark.parametrize(
    "content",
    [struct.pack("<4Q", 0, 2048, 4096, 10240), b"v1.2 3\njpg 512 651 0.jpg txt 1536 11 0.txt\n"],
    ids=["energon", "dali"],
)
def test_the_index_of_another_tool_is_left_alone(tmp_path, monkeypatch, content):
    """It has the name that ours would have; ours goes into the cache folder."""
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "shards", 12, 12)
    shard = tmp_path / "shards" / "train-000000.tar"
    (tmp_path / "shards" / "manifest.json").unlink()
    theirs = tmp_path / "shards" / "train-000000.tar.idx"
    expected = load_index(theirs).digest
    theirs.write_bytes(content)
    for force in (False, False, True):
        assert load_or_build_index(str(shard), force=force).digest == expected
        assert theirs.read_bytes() == content
    assert len(list((tmp_path / "cache").rglob("*.tar.idx"))) == 1
    assert len(ShardSet.open(str(shard))) == 12
