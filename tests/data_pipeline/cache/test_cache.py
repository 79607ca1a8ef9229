"""Reading through a node's cache: the same bytes, each downloaded once, whatever happens."""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cache.blocks import (
    WHOLE_SHARD,
    Blocks,
    block_key,
    block_rows,
    extent_of_byte,
    extent_of_row,
)
from data_pipeline.cache.cache import CachedShards, CacheSettings
from data_pipeline.cache.cache_folder import CacheFolder
from data_pipeline.reading.reader import BadSample, SampleReader, TransientReadError
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import Shard, ShardSet
from data_pipeline.storage.remote import RemoteSettings
from tests.data_pipeline.cache.test_cache_folder import other_files
from tests.data_pipeline.small_shards import sample, write_shards
from tests.data_pipeline.storage.faulty_server import FaultyServer, garbled, slow, status

GIB, KIB = 2.0**-30, 2.0**-10
QUICK = RemoteSettings(
    retry_first_wait_s=0.01, retry_longest_wait_s=0.05, timeout_s=30.0, retry_deadline_s=30.0
)
IMPATIENT = QUICK.model_copy(update={"retry_deadline_s": 1.0})
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "indices"))


@pytest.fixture
def www(tmp_path) -> Path:
    write_shards(tmp_path / "www" / "set", 100, 40)
    return tmp_path / "www"


@pytest.fixture
def server(www):
    with FaultyServer(www) as server:
        yield server


@pytest.fixture
def settings(tmp_path) -> CacheSettings:
    """Blocks of eight samples of `small_shards.py`."""
    return CacheSettings(folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=24 * KIB)


def reader(shards: ShardSet, settings: CacheSettings) -> SampleReader:
    return SampleReader(shards, CachedShards(shards, settings), first_wait_s=0.01)


def check(reads: SampleReader, rows=None) -> None:
    for row in range(len(reads.shards)) if rows is None else rows:
        found = reads.read(row)
        assert (found.key, found.members) == sample(row)


def blocks_in(settings: CacheSettings) -> list[Path]:
    return [path for path in Path(settings.folder).glob("??/*") if path.is_file()]


def asked_of_tars(server: FaultyServer) -> list[tuple[str, str]]:
    """Downloads; a first request for a byte tells the version."""
    asked = [a for a in server.asked if a[0].endswith(".tar") and a[1] != "bytes=0-0"]
    return sorted(asked)


def test_a_block_holds_a_power_of_two_of_samples():
    shard = Shard("a.tar", 100, 100_000, "digest")
    sizes = (1, 1000, 1400, 1500, 9000, 10**9, WHOLE_SHARD)
    assert [block_rows(shard, size) for size in sizes] == [1, 1, 1, 2, 8, 64, 100]
    assert block_rows(Shard("a.tar", 3, 0, "digest"), 100) == 64


@pytest.mark.parametrize("block_bytes", [1.0, 6e3, 1e5, WHOLE_SHARD])
def test_blocks_hold_all_bytes_of_a_shard(tmp_path, block_bytes):
    shards = write_shards(tmp_path / "set", 50, 20)
    blocks = Blocks({"a": shards}, block_bytes)
    numbers = blocks.of_rows("a", np.arange(50))
    assert sorted(set(numbers.tolist())) == list(range(len(blocks)))
    names = set()
    for number, shard in enumerate(shards.shards):
        extents = [blocks.extent(b)[1] for b in range(len(blocks))]
        extents = [extent for extent in extents if extent.number == number]
        assert extents[0].begin == 0 and extents[-1].end == shard.bytes
        assert all(a.end == b.begin for a, b in pairwise(extents))
        for extent in extents:
            for byte in (extent.begin, extent.end - 1):
                assert extent_of_byte(shards, number, byte, block_bytes) == extent
        names |= {extent.name for extent in extents}
    for row, block in enumerate(numbers.tolist()):
        number, local = shards.locate(row)
        extent = extent_of_row(shards, number, local, block_bytes)
        assert blocks.extent(block) == ("a", extent)
        begin, end = shards.index(number).span(local)
        assert extent.begin <= begin < end <= extent.end
    key = block_key(shards.shards[0])
    found = blocks.named([*names, "ab12-0-8", "nonsense", f"{key}-?-8", key])
    assert sorted(found.values()) == list(range(len(blocks)))
    other = Blocks({"a": shards}, block_bytes * 2 if block_bytes < 1e5 else 1.0)
    others = {other.extent(block)[1].name for block in range(len(other))}
    assert set(other.named(names)) == others & names
    assert blocks.sizes().sum() == pytest.approx(sum(s.bytes for s in shards.shards))


def test_sets_share_the_blocks_of_a_shard(tmp_path):
    both = write_shards(tmp_path / "set", 50, 20)
    one = ShardSet(both.shards[1:2])
    blocks = Blocks({"both": both, "one": one}, 6e3)
    assert len(blocks) == len(Blocks({"both": both}, 6e3))
    expected = blocks.of_rows("both", np.arange(20, 40))
    assert blocks.of_rows("one", np.arange(20)).tolist() == expected.tolist()
    assert blocks.total_bytes == sum(shard.bytes for shard in both.shards)


@given(st.integers(0, 2**30), st.integers(0, 2**30), st.sampled_from([1.0, 6e3, WHOLE_SHARD]))
def test_any_range_is_read(tmp_path_factory, begin, end, block_bytes):
    folder = tmp_path_factory.getbasetemp() / "ranges"
    if not folder.exists():
        write_shards(folder / "set", 30, 30)
    shards = ShardSet.open(folder / "set")
    size = shards.shards[0].bytes
    begin, end = sorted((begin % (size + 1), end % (size + 1)))
    mib = None if block_bytes == WHOLE_SHARD else block_bytes / 2**20
    settings = CacheSettings(folder=str(folder / "cache"), max_gib=1.0, block_mib=mib)
    content = Path(shards.shards[0].path).read_bytes()
    assert CachedShards(shards, settings).pread(0, begin, end) == content[begin:end]


def test_each_block_is_downloaded_once(server, settings):
    shards = ShardSet.open(server.url + "/set", QUICK)
    reads = reader(shards, settings)
    check(reads, np.random.default_rng(0).permutation(100).tolist())
    asked = asked_of_tars(server)
    assert len(asked) == len(set(asked)) == len(blocks_in(settings)) == 13
    counters = reads.source.counters
    assert (counters["cache_misses"], counters["cache_hits"]) == (13, 87)
    assert counters["bytes_read"] == sum(shard.bytes for shard in shards.shards)
    again = reader(ShardSet.open(server.url + "/set", QUICK), settings)  # another run
    check(again)
    assert asked_of_tars(server) == asked
    assert again.source.counters == {
        "bytes_read": 0,
        "retries": 0,
        "cache_hits": 100,
        "cache_misses": 0,
    }
    assert not other_files(Path(settings.folder))


def test_what_is_expected_is_fetched_side_by_side(server, settings):
    server.always = slow(0.1)
    shards = ShardSet.open(server.url + "/set", QUICK)
    reads = reader(shards, settings)
    for row in range(100):
        reads.expect([row])
    check(reads)
    assert server.busiest > 4
    asked = asked_of_tars(server)
    assert len(asked) == len(set(asked)) == 13
    counters = reads.source.counters
    assert (counters["cache_misses"], counters["cache_hits"]) == (13, 87)
    server.always = status(503)
    reads.expect(range(100))  # is there


def test_processes_share_downloads(server, settings):
    server.always = slow(0.02)
    shards = ShardSet.open(server.url + "/set", QUICK)
    processes = [fork.Process(target=lambda: check(reader(shards, settings))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    asked = asked_of_tars(server)
    assert len(asked) == len(set(asked)) == 13


def test_a_reader_that_is_killed_holds_nobody_up(server, settings):
    shards = ShardSet.open(server.url + "/set", QUICK)
    shards.index(0)
    server.faults.append(slow(30.0))
    victim = fork.Process(target=lambda: check(reader(shards, settings)))
    victim.start()
    while not any(name.endswith(".tar") for name, _ in server.asked):
        time.sleep(0.01)
    assert any(name.endswith(".tmp") for name in other_files(Path(settings.folder)))
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    started = time.monotonic()
    check(reader(shards, settings))
    assert time.monotonic() - started < 20


def test_equal_names_and_changed_shards_do_not_meet(tmp_path, settings):
    first = write_shards(tmp_path / "one", 16, 16)
    with ShardWriter(tmp_path / "two", "train", max_samples=16) as writer:
        for number in range(16):
            writer.write(f"{number:06d}", sample(number + 100)[1])
    second = ShardSet.open(tmp_path / "two")
    assert [s.name for s in first.shards] == [s.name for s in second.shards]
    check(reader(first, settings))
    other = reader(second, settings)
    for row in range(16):
        assert other.read(row).members == sample(row + 100)[1]
    assert len(blocks_in(settings)) == 4
    # The same content elsewhere is the same block.
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    check(moved := reader(ShardSet.open(tmp_path / "three"), settings))
    assert moved.source.counters["cache_misses"] == 0
    # A remote file of another version is not, even if nothing else tells.
    shard = first.shards[0]
    changed = Shard(shard.path, shard.samples, shard.bytes, shard.index_digest, version='"2"')
    names = {extent_of_row(s, 0, 0, 6e3).name for s in (first, ShardSet([changed]))}
    assert len(names) == 2


def test_a_damaged_copy_is_fetched_again(server, settings, caplog):
    shards = ShardSet.open(server.url + "/set", QUICK)
    check(reader(shards, settings))
    for path in blocks_in(settings):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        check(again := reader(shards, settings))
    assert "does not match its checksums; fetching it again" in caplog.text
    assert 1 <= again.source.counters["cache_misses"] <= 13
    assert again.source.counters["retries"] == caplog.text.count("fetching it again")
    check(third := reader(shards, settings))
    assert third.source.counters["cache_misses"] == 0
    os.truncate(blocks_in(settings)[0], 100)
    check(third)
    assert third.source.counters["cache_misses"] == 1


@pytest.mark.parametrize("remote", [True, False])
def test_a_damaged_copy_that_cannot_be_removed_is_read_past(
    server, www, settings, caplog, monkeypatch, remote
):
    """It belongs to another user, or its disk can only be read."""
    shards = ShardSet.open(server.url + "/set" if remote else www / "set", QUICK)
    check(reader(shards, settings))
    for path in blocks_in(settings):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    monkeypatch.setattr(CacheFolder, "_locked", forbidden)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        check(again := reader(shards, settings))
    assert "does not match its checksums; reading past it" in caplog.text
    assert again.source.counters["cache_hits"] and again.source.counters["cache_misses"]
    # Damage that the origin has too is still what it is.
    if not remote:
        path, offset = Path(shards.shards[0].path), shards.index(0).members(5)[0][1]
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
        (copy,) = (
            p
            for p in blocks_in(settings)
            if p.name == extent_of_row(shards, 0, 5, settings.block_bytes).name
        )
        copy.write_bytes(bytes(copy.stat().st_size))
        with pytest.raises(BadSample, match="'000005'"):
            reader(shards, settings).read(5)


def forbidden(folder: CacheFolder):
    raise PermissionError(13, "Permission denied", str(folder.folder / "usage.lock"))


def test_damage_at_the_origin_is_a_bad_sample(tmp_path, settings):
    shards = write_shards(tmp_path / "set", 40, 40)
    path = Path(shards.shards[0].path)
    content = bytearray(path.read_bytes())
    offset = shards.index(0).members(5)[0][1]
    content[offset] ^= 1
    path.write_bytes(content)
    reads = reader(shards, settings)
    check(reads, [4, 6])
    with pytest.raises(BadSample, match=r"sample '000005' \(row 5\): member .jpg .* is damaged"):
        reads.read(5)
    assert reads.source.counters["cache_misses"] == 2  # once more, and no more
    check(reads, [4, 6])


def test_a_folder_that_fails_is_read_past(tmp_path, server, settings, caplog):
    (tmp_path / "file").write_bytes(b"")
    broken = settings.model_copy(update={"folder": str(tmp_path / "file" / "cache")})
    shards = ShardSet.open(server.url + "/set", QUICK)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        check(reads := reader(shards, broken))
    assert caplog.text.count("this process reads on without adding to the cache") == 1
    assert "file/cache: Not a directory" in caplog.text
    assert reads.source.counters["cache_misses"] == 100
    check(reader(shards, settings))
    held = settings.model_copy(update={"max_gib": 30_000 * GIB})  # no block fits beside these
    check(past := reader(ShardSet.open(server.url + "/set", QUICK), held), range(50))
    assert past.source.counters["cache_misses"] == 0
    shutil.rmtree(settings.folder)  # while it is in use
    check(past)


def test_a_cap_that_leaves_no_room_is_kept(server, settings):
    small = settings.model_copy(update={"max_gib": 50_000 * GIB})
    shards = ShardSet.open(server.url + "/set", QUICK)
    check(reads := reader(shards, small))
    sizes = [path.stat().st_size for path in blocks_in(small)]
    assert sizes and sum(sizes) <= 50_000
    assert reads.source.counters["cache_misses"] > 13
    none = settings.model_copy(update={"max_gib": 10 * GIB, "folder": settings.folder + "-none"})
    check(reader(shards, none))
    assert not blocks_in(none)


def test_wrong_bytes_that_were_sent_once_are_no_damage(server, settings):
    shards = ShardSet.open(server.url + "/set", QUICK)
    no_room = {"max_gib": 10 * GIB, "folder": settings.folder + "-none"}
    for number, update in enumerate(({}, no_room)):
        reads = reader(shards, settings.model_copy(update=update))
        server.faults.append(garbled)
        check(reads, [70 + number])
        assert not server.faults


def test_whole_shards(server, settings):
    whole = settings.model_copy(update={"block_mib": None})
    shards = ShardSet.open(server.url + "/set", QUICK)
    check(reader(shards, whole))
    sizes = [path.stat().st_size for path in blocks_in(whole)]
    assert sorted(sizes) == sorted(shard.bytes for shard in shards.shards)


def test_a_server_that_stays_away_ends_reading(server, settings):
    shards = ShardSet.open(server.url + "/set", IMPATIENT)
    check(reads := reader(shards, settings), range(8))
    server.always = status(503)
    check(reads, range(8))
    with pytest.raises(TransientReadError, match=r"train-000000\.tar"):
        reads.read(30)
    assert not other_files(Path(settings.folder))


def test_open_files_are_few(tmp_path, settings):
    shards = write_shards(tmp_path / "set", 60, 2)
    reads = reader(shards, settings)
    check(reads)
    before = len(os.listdir("/proc/self/fd"))
    check(reads)
    check(reads)
    assert len(os.listdir("/proc/self/fd")) <= before  # what others left may be closed meanwhile
    copy = pickle.loads(pickle.dumps(reads))
    check(copy)
    assert copy.source.counters["cache_misses"] == 0
