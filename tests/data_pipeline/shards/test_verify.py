"""Verification lists every damaged sample of a shard, and misses no changed byte."""

import os
import shutil

import numpy as np
import pytest

from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.shards.index import index_path
from data_pipeline.shards.index_file import load_index
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.shards.verify import verify_shard
from tests.data_pipeline.small_shards import sample, write_shards


@pytest.fixture
def shard(tmp_path):
    write_shards(tmp_path, 12, 12)
    return tmp_path / "train-000000.tar"


def verify(shard):
    return verify_shard(str(shard), load_index(index_path(shard)))


def test_a_whole_shard(shard):
    passed = []
    report = verify_shard(str(shard), load_index(index_path(shard)), passed.append)
    assert report.intact and report.samples == 12
    assert sum(passed) == report.bytes == shard.stat().st_size


def test_all_damaged_samples_are_listed(shard):
    index = load_index(index_path(shard))
    data = bytearray(shard.read_bytes())
    data[index.members(2)[0][1]] ^= 1  # payload of the jpg
    data[index.members(5)[1][1] - 512 + 3] ^= 1  # name in the header of the json
    data[index.members(5)[2][1]] ^= 1
    shard.write_bytes(data)
    report = verify(shard)
    assert list(report.damaged) == ["000002", "000005"]
    assert "member .jpg: damaged payload" in report.damaged["000002"]
    assert "member .json: damaged tar header" in report.damaged["000005"]
    assert len(report.faults) == 1 and "not a tar header" in report.faults[0]


def test_truncation_lists_every_sample_behind_it(shard):
    index = load_index(index_path(shard))
    os.truncate(shard, index.span(8)[0] + 700)
    report = verify(shard)
    assert list(report.damaged) == [f"{n:06d}" for n in range(8, 12)]
    assert any("truncated or replaced" in fault for fault in report.faults)


def test_members_that_the_index_does_not_know(shard, tmp_path):
    write_shards(tmp_path / "other", 13, 13)
    shutil.copy(tmp_path / "other" / "train-000000.tar", shard)
    report = verify(shard)
    assert any("0 members of its index are not in the tar, and 3" in f for f in report.faults)


def test_no_damage_is_silent(tmp_path):
    """Each of 200 truncations and bit flips is reported; reading never returns wrong bytes."""
    write_shards(tmp_path / "whole", 12, 12)
    whole = (tmp_path / "whole" / "train-000000.tar").read_bytes()
    index = load_index(tmp_path / "whole" / "train-000000.tar.idx")
    meaningful = np.zeros(len(whole), bool)
    for row in range(12):
        for _, offset, size, _, _ in index.members(row):
            meaningful[offset - 512 : offset + size] = True
    meaningful[-1024:] = True  # the end-of-archive marker
    places = np.flatnonzero(meaningful)
    rng = np.random.default_rng(7)
    shard = tmp_path / "whole" / "train-000000.tar"
    wrong, unread = 0, 0
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[rng.integers(1, len(whole)) :]
        else:
            damaged[rng.choice(places)] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        report = verify_shard(str(shard), index)
        assert not report.intact, trial
        reader = SampleReader(ShardSet.open(tmp_path / "whole"), retries=0)
        for row in range(12):
            try:
                wrong += reader.read(row).members != sample(row)[1]
            except BadSample as error:
                assert str(shard) in str(error)
                unread += 1
        reader.close()
    assert wrong == 0 and unread > 200


def test_bytes_between_members_change_the_hash_only(shard):
    before = verify(shard)
    index = load_index(index_path(shard))
    _, offset, size, _, _ = index.members(0)[0]
    assert size % 512
    with open(shard, "r+b") as file:
        file.seek(offset + size)
        file.write(b"x")
    after = verify(shard)
    assert after.intact and after.sha256 != before.sha256
