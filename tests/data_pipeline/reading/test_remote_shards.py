"""Shards behind a web server: the data set that is on its disk, or an error that names why not."""

import dataclasses
import logging
import multiprocessing
import os
import shutil
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cache.cache import CachedShards, CacheSettings, source_of
from data_pipeline.reading.reader import BadSample, SampleReader, TransientReadError
from data_pipeline.reading.remote_ranges import RemoteRanges
from data_pipeline.shards import remote_index
from data_pipeline.shards.index_file import headers_digest, load_index, save_index, with_digest
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.remote import RemoteSettings
from tests.data_pipeline.loader.test_loader import contents, loader
from tests.data_pipeline.photos import pack
from tests.data_pipeline.small_shards import sample, write_shards
from tests.data_pipeline.storage.faulty_server import (
    FaultyServer,
    anonymous,
    dropped,
    garbled,
    login_page,
    refusing_what_is_absent,
    shifted,
    short,
    slow,
    status,
    whole,
)

QUICK = RemoteSettings(
    retry_first_wait_s=0.01, retry_longest_wait_s=0.05, timeout_s=2.0, retry_deadline_s=20.0
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def www(tmp_path) -> Path:
    write_shards(tmp_path / "www" / "set", 100, 40)
    return tmp_path / "www"


@pytest.fixture
def server(www):
    with FaultyServer(www) as server:
        yield server


def without_companions(folder: Path) -> None:
    """Leave the tars alone."""
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()


def read_all(shards: ShardSet) -> list:
    with SampleReader(shards) as reader:
        return [reader.read(row) for row in range(len(shards))]


def is_whole(shards: ShardSet) -> bool:
    found = [(read.key, read.members) for read in read_all(shards)]
    return found == [sample(number) for number in range(len(shards))]


def test_all_ways_to_name_remote_shards(server, www):
    local = ShardSet.open(www / "set")
    url = server.url + "/set"
    for specs in (
        url,
        url + "/",
        url + "/train-00000{0..2}.tar",
        [f"{url}/train-00000{n}.tar?key=hush" for n in range(3)],
        [f"{url}/train-000000.tar", *(str(www / "set" / f"train-00000{n}.tar") for n in (1, 2))],
    ):
        remote = ShardSet.open(specs, QUICK)
        assert remote.fingerprint == local.fingerprint
        assert [shard.name for shard in remote.shards] == [shard.name for shard in local.shards]
        assert is_whole(remote)
        assert (remote.column("width") == local.column("width")).all()


def test_a_manifest_is_all_that_opening_reads(server):
    ShardSet.open(server.url + "/set", QUICK)
    assert {name for name, _ in server.asked} == {"set/manifest.json"}


def test_indices_are_fetched_once_and_checked(server, www, cache):
    (www / "set" / "manifest.json").unlink()
    specs = server.url + "/set/train-00000{0..2}.tar"
    opened = ShardSet.open(specs, QUICK)
    assert all(shard.version for shard in opened.shards) and is_whole(opened)
    asked = [name for name, _ in server.asked if name.endswith(".idx")]
    assert sorted(set(asked)) == [f"set/train-00000{n}.tar.idx" for n in range(3)]
    server.asked.clear()
    assert ShardSet.open(specs, QUICK).fingerprint == opened.fingerprint
    assert not [name for name, _ in server.asked if name.endswith(".idx")]
    # A damaged copy in the cache is replaced, a damaged original is named.
    (copy,) = (cache / "indices").glob("*train-000001.tar.idx")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert ShardSet.open(specs, QUICK).fingerprint == opened.fingerprint
    shutil.rmtree(cache)
    original = www / "set" / "train-000001.tar.idx"
    original.write_bytes(original.read_bytes()[:-9] + b"123456789")
    with pytest.raises(ShardError, match=rf"{server.url}/set/train-000001\.tar\.idx: damaged"):
        ShardSet.open(specs, QUICK)
    shutil.copy(www / "set" / "train-000002.tar.idx", original)
    with pytest.raises(ShardError, match=r"train-000001\.tar: has \d+ bytes, but its index"):
        ShardSet.open(specs, QUICK)
    assert not list((cache / "indices").glob(".*"))


@pytest.mark.parametrize("kept", [False, True])
def test_an_index_of_other_content_is_refused_until_it_is_put_right(server, www, cache, kept):
    """As between the uploads of a manifest and of an index."""
    place = www / "set" / "train-000001.tar.idx"
    right, index = place.read_bytes(), load_index(place)
    fields = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    fields["arrays"] = index.arrays | {"member_crc32": index.arrays["member_crc32"] + np.uint32(1)}
    other = with_digest(**{name: value for name, value in fields.items() if name != "digest"})
    opened = ShardSet.open(server.url + "/set", QUICK)
    if kept:  # as earlier versions did
        opened.index(1)
        (copy,) = (cache / "indices").glob("*train-000001.tar.idx")
        save_index(other, copy)
    save_index(other, place)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"train-000001\.tar: its index does not belong"):
            ShardSet.open(server.url + "/set", QUICK).index(1)
    place.write_bytes(right)
    assert is_whole(ShardSet.open(server.url + "/set", QUICK))
    server.asked.clear()
    ShardSet.open(server.url + "/set", QUICK).fetch_indices(range(3))
    assert not [name for name, _ in server.asked if name.endswith(".idx")]


def test_a_tar_without_index_is_indexed_by_its_headers(server, www):
    local = ShardSet.open(www / "set")
    without_companions(www / "set")
    specs = server.url + "/set/train-00000{0..2}.tar"
    opened = ShardSet.open(specs, QUICK)
    assert is_whole(opened)
    for number in range(3):
        weak, strong = opened.index(number), local.index(number)
        assert not weak.payloads_hashed and strong.payloads_hashed
        assert weak.digest != strong.digest
        assert weak.keys() == strong.keys() and set(weak.columns) == set(strong.columns)
        for name in set(weak.arrays) - {"member_crc32"}:
            assert (weak.arrays[name] == strong.arrays[name]).all()
    full = ShardSet.open(specs, QUICK.model_copy(update={"foreign_index": "full"}))
    assert full.fingerprint == local.fingerprint != opened.fingerprint


def companions(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tar"}


def grown_old(cache: Path, at: float = 1.0) -> None:
    for path in (cache / "indices").iterdir():
        os.utime(path, (at, at))


def test_a_full_index_that_comes_later_takes_the_place_of_one_of_headers(server, www, cache):
    local, taken = ShardSet.open(www / "set"), companions(www / "set")
    digests = [headers_digest(local.index(number)) for number in range(3)]
    without_companions(www / "set")
    specs = server.url + "/set/train-00000{0..2}.tar"
    weak = ShardSet.open(specs, QUICK)
    assert digests == [weak.index(number).digest for number in range(3)]
    assert digests == [headers_digest(weak.index(number)) for number in range(3)]
    # Processes that start together ask once whether there are better ones.
    for much_later in (False, 1.0, False, time.time() + 7200):  # a clock that was set back, too
        if much_later:
            grown_old(cache, much_later)
        server.asked.clear()
        assert not ShardSet.open(specs, QUICK).index(0).payloads_hashed
        asked = Counter(name for name, _ in server.asked if name.endswith(".idx"))
        assert list(asked.values()) == [1, 1, 1] * bool(much_later)
    for path, content in taken.items():
        if path.suffix == ".idx":
            path.write_bytes(content)
    assert not ShardSet.open(specs, QUICK).index(0).payloads_hashed  # asked a moment ago
    grown_old(cache)
    full = ShardSet.open(specs, QUICK)
    assert full.fingerprint == local.fingerprint != weak.fingerprint
    assert full.fingerprint_by_headers() == weak.fingerprint == weak.fingerprint_by_headers()
    assert (weak.known_by_headers, full.known_by_headers) == ([0, 1, 2], [])
    # A run that began before goes on: the samples are the same, and more is known of them.
    for shards in (weak, ShardSet(weak.shards, storage=weak.storage)):
        assert is_whole(shards)
    shutil.rmtree(cache)
    assert is_whole(going_on := ShardSet(weak.shards, storage=weak.storage))
    assert going_on.index(0).payloads_hashed
    # Another shard under its name is still none of its samples.
    other = ShardSet([weak.shards[0], dataclasses.replace(weak.shards[1], index_digest="0")])
    with pytest.raises(ShardError, match="its index does not belong to the shard"):
        other.index(1)


ONE_BY_ONE = QUICK.model_copy(update={"requests_per_host": 1})


def asked_indices(server) -> list[int]:
    asked = Counter(name for name, _ in server.asked if name.endswith(".idx"))
    return [asked[name] for name in sorted(asked)]


def refusals_of_indices(caplog) -> list[str]:
    """What the log files of a run would hold of them, too."""
    ours = [record for record in caplog.records if record.name.startswith("omnipretrain.")]
    texts = (record.getMessage() for record in ours)
    return [text for text in texts if "indices are refused" in text]


@pytest.mark.parametrize("named_by", ["names", "other folders"])
def test_refused_indices_beside_shards_that_can_be_read_are_absent_ones(
    server, www, cache, caplog, named_by
):
    """What a store answers to those who may not list it; said, and asked again, once."""
    local = ShardSet.open(www / "set")
    digests = [headers_digest(local.index(number)) for number in range(3)]
    without_companions(www / "set")
    server.of, server.always = "", refusing_what_is_absent
    if named_by == "names":  # the folder refused its manifest before
        specs, asked = server.url + "/set/train-00000{0..2}.tar", [1, 1, 1]
    else:
        server.faults.append(status(404))  # the manifest
        specs, asked = server.url + "/set/./train-00000{0..2}.tar", [4, 1, 1]
    caplog.set_level(logging.WARNING)
    opened = ShardSet.open(specs, ONE_BY_ONE)
    assert [opened.index(number).digest for number in range(3)] == digests and is_whole(opened)
    assert asked_indices(server) == asked
    (said,) = refusals_of_indices(caplog)
    assert "/set" in said and "HTTP 403" in said and "may list" in said
    server.asked.clear()
    grown_old(cache)
    assert ShardSet.open(specs, ONE_BY_ONE).fingerprint == opened.fingerprint
    assert sum(asked_indices(server)) <= sum(asked) and len(refusals_of_indices(caplog)) == 1


def test_an_index_that_was_refused_once_is_taken(server, www, caplog):
    (www / "set" / "manifest.json").unlink()
    server.of = ".idx"
    server.faults.extend([status(403)] * 3)
    opened = ShardSet.open(server.url + "/set/train-00000{0..2}.tar", ONE_BY_ONE)
    assert all(opened.index(number).payloads_hashed for number in range(3))
    assert not server.faults and not refusals_of_indices(caplog)
    # And a shard that is refused is no shard without an index.
    server.of, server.always = ".tar", status(403)
    with pytest.raises(PermissionError, match=r"train-000000\.tar: HTTP 403 .*refuses access"):
        ShardSet.open(server.url + "/set/train-000000.tar", ONE_BY_ONE)


def test_indices_in_a_folder_of_another_user_are_read(server, www, cache, monkeypatch):
    without_companions(www / "set")
    specs = server.url + "/set/train-00000{0..2}.tar"
    before = ShardSet.open(specs, QUICK)
    grown_old(cache)  # so that better ones would be looked for

    def forbidden(place):
        raise PermissionError(13, "Permission denied", f"{place}.lock")

    monkeypatch.setattr(remote_index, "exclusive", forbidden)
    now = ShardSet.open(specs, QUICK)
    assert now.fingerprint == before.fingerprint and is_whole(now)
    next((cache / "indices").glob("*train-000001.tar.idx")).unlink()
    with pytest.raises(PermissionError, match=r"OMNIPRETRAIN_CACHE .*000001\.tar\.idx\.lock"):
        ShardSet.open(specs, QUICK)


def test_a_run_goes_on_though_one_of_its_indices_was_refused_when_it_began(server, www, cache):
    (www / "set" / "manifest.json").unlink()
    server.of, server.always = "train-000001.tar.idx", status(403)
    specs = server.url + "/set/train-00000{0..2}.tar"
    before = ShardSet.open(specs, QUICK)
    server.always = None
    shutil.rmtree(cache)
    now, local = ShardSet.open(specs, QUICK), ShardSet.open(www / "set")
    assert (before.known_by_headers, now.known_by_headers) == ([1], [])
    assert now.fingerprint != before.fingerprint != now.fingerprint_by_headers()
    for later in (now, local):  # or on a copy of the shards
        assert later.fingerprint_by_headers([1]) == before.fingerprint
    assert is_whole(before)


def test_where_a_full_index_is_wanted_one_of_headers_will_not_do(server, www, cache):
    local = ShardSet.open(www / "set")
    without_companions(www / "set")
    specs = server.url + "/set/train-00000{0..2}.tar"
    for number, shard in enumerate(ShardSet.open(specs, QUICK).shards):
        weak = ShardSet.open(specs, QUICK).index(number)
        save_index(weak, www / "set" / f"{shard.name}.idx")
    settings = QUICK.model_copy(update={"foreign_index": "full"})
    full = ShardSet.open(specs, settings)
    assert full.fingerprint == local.fingerprint
    # What one run has built is at hand for all others.
    server.asked.clear()
    assert ShardSet.open(specs, QUICK).fingerprint == local.fingerprint
    assert not [name for name, _ in server.asked if name.endswith(".idx")]
    shutil.rmtree(cache)
    assert not ShardSet.open(specs, QUICK).index(0).payloads_hashed


def test_header_only_indexing_loads_little(tmp_path):
    from data_pipeline.shards.packer import ShardWriter

    with ShardWriter(tmp_path / "www") as writer:
        for number in range(20):
            writer.write(f"{number}", {"jpg": bytes(200_000), "cls": b"3", "txt": b"a"})
    without_companions(tmp_path / "www")
    with FaultyServer(tmp_path / "www") as server:
        opened = ShardSet.open(server.url + "/shard-000000.tar", QUICK)
        assert opened.column("cls").tolist() == [3] * 20
        spans = [span.removeprefix("bytes=").split("-") for _, span in server.asked if span]
        loaded = sum(int(last) - int(first) + 1 for first, last in spans)
    assert loaded < 0.1 * opened.shards[0].bytes
    assert len(spans) < 2.5 * 20


def test_what_an_index_of_headers_does_and_does_not_see(server, www):
    without_companions(www / "set")
    specs = server.url + "/set/train-000000.tar"
    opened = ShardSet.open(specs, QUICK)
    index = opened.index(0)
    path = www / "set" / "train-000000.tar"
    content = bytearray(path.read_bytes())
    _, offset, size, _, _ = index.members(2)[0]
    content[offset + size // 2] ^= 1  # inside of a payload
    _, header, *_ = index.members(3)[0]
    content[header - 512 + 130] ^= 1  # a digit of a size
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    reader = SampleReader(opened)
    assert reader.read(2).members != sample(2)[1]  # its documented weakness
    with pytest.raises(BadSample, match=r"'000003'.*this is not a tar header"):
        reader.read(3)


@pytest.mark.parametrize("kind", ["headers", "full"])
def test_a_server_that_tells_no_versions(server, www, tmp_path, kind):
    without_companions(www / "set")
    server.of, server.always = "", anonymous
    settings = QUICK.model_copy(update={"foreign_index": kind})
    opened = ShardSet.open(server.url + "/set/train-00000{0..2}.tar", settings)
    assert [shard.version for shard in opened.shards] == [""] * 3
    assert is_whole(opened)
    again = ShardSet(opened.shards, storage=opened.storage)
    assert is_whole(again) and again.index(0).payloads_hashed == (kind == "full")
    cache = CachedShards(opened, CacheSettings(folder=str(tmp_path / "blocks"), max_gib=0.1))
    assert SampleReader(opened, cache).read(50).members == sample(50)[1]


def test_a_damaged_remote_tar_is_named(server, www):
    without_companions(www / "set")
    path = www / "set" / "train-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    for kind in ("headers", "full"):
        settings = QUICK.model_copy(update={"foreign_index": kind})
        with pytest.raises(ShardError, match=r"/set/train-000001\.tar\?\.\.\.: .*truncated"):
            ShardSet.open(server.url + "/set/train-00000{0..2}.tar?sig=1", settings)


def test_names_that_lead_nowhere(server):
    with pytest.raises(FileNotFoundError, match=r"none\.tar: HTTP 404"):
        ShardSet.open(server.url + "/none.tar", QUICK)
    with pytest.raises(FileNotFoundError, match=r"no \.tar and holds no manifest\.json"):
        ShardSet.open(server.url + "/none", QUICK)
    with pytest.raises(ShardError, match="web servers cannot be listed"):
        ShardSet.open(server.url + "/set/*.tar", QUICK)
    with pytest.raises(ShardError, match="read it as a stream"):
        ShardSet.open(server.url + "/set/x.tar.gz", QUICK)
    with pytest.raises(ShardError, match="read it as a stream"):
        ShardSet.open("pipe:cat x.tar", QUICK)
    with pytest.raises(ShardError, match="is listed twice"):
        ShardSet.open([server.url + "/set", server.url + "/set"], QUICK)


def test_wrong_bytes_that_were_sent_once_are_no_damage(server, www):
    shards = ShardSet.open(server.url + "/set", QUICK)
    reader = SampleReader(shards)
    server.faults.extend([garbled] * 2)
    reader.expect([3, 30])
    assert [reader.read(row).members for row in (3, 30)] == [sample(n)[1] for n in (3, 30)]
    # One of them met the question for size and version, which has no use for the bytes.
    assert not server.faults and reader.source.counters["retries"] == 1
    server.always = garbled  # a server that goes on like this has a damaged file
    with pytest.raises(BadSample, match="'000070'"):
        reader.read(70)
    server.always = None
    assert reader.read(70).members == sample(70)[1]
    assert is_whole(shards)


@pytest.mark.parametrize("cached", [False, True])
def test_another_page_in_place_of_a_shard_once_is_no_damage(server, tmp_path, cached):
    shards = ShardSet.open(server.url + "/set", QUICK)
    cache = CacheSettings(folder=str(tmp_path / "blocks"), max_gib=0.1) if cached else None
    reader = SampleReader(shards, source_of(shards, cache))
    for row, faults in ((3, [login_page]), (50, [lambda request: request.send_file(), login_page])):
        server.faults.extend(faults)  # the first request asks for size and version
        assert reader.read(row).members == sample(row)[1]
        assert not server.faults and reader.source.counters["retries"] == 1 + row // 50
    server.always = login_page
    with pytest.raises(BadSample, match=r"has 5000 bytes, but its index describes"):
        SampleReader(shards).read(3)


def test_a_file_that_changes_in_mid_run_is_named(server, www):
    opened = ShardSet.open(server.url + "/set", QUICK)
    small = QUICK.model_copy(update={"block_kib": 16})
    reader = SampleReader(ShardSet(opened.shards, storage=type(opened.storage)(small)))
    reader.read(0)
    path = www / "set" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BadSample, match=r"'000035'.*train-000000\.tar: was replaced: it has"):
        reader.read(35)
    os.truncate(path, 1000)
    with pytest.raises(BadSample, match=r"has 1000 bytes, but its index describes"):
        SampleReader(opened).read(5)
    path.unlink()
    with pytest.raises(BadSample, match=r"train-000000\.tar: HTTP 404"):
        SampleReader(opened).read(5)


def test_refused_access_ends_the_run(server):
    opened = ShardSet.open(server.url + "/set", QUICK)
    server.always = status(403)
    with pytest.raises(TransientReadError, match=r"HTTP 403 .*refuses access"):
        SampleReader(opened).read(5)


def test_a_server_that_refuses_an_index_ends_the_run(server):
    """Access is no property of a sample: nothing may take its place."""
    opened = ShardSet.open(server.url + "/set", QUICK)
    server.of, server.always = "train-000001.tar.idx", status(403)
    reader = SampleReader(opened)
    assert reader.read(5).members == sample(5)[1]
    server.of = ""
    with pytest.raises(TransientReadError, match=r"train-000001\.tar.*HTTP 403 .*refuses access"):
        reader.read(45)
    with pytest.raises(PermissionError, match=r"/set/manifest\.json: HTTP 403"):
        ShardSet.open(server.url + "/set", QUICK)


def read_in_another_process(reader, queue):
    queue.put([reader.read(row).members == sample(row)[1] for row in range(100)])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_use_in_other_processes(server, method):
    reader = SampleReader(ShardSet.open(server.url + "/set", QUICK))
    reader.read(0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_in_another_process, args=(reader, queue)) for _ in "12"]
    for worker in workers:
        worker.start()
    for row in range(100):
        assert reader.read(row).members == sample(row)[1]
    assert [queue.get(timeout=60) for _ in workers] == [[True] * 100] * 2
    for worker in workers:
        worker.join()


def test_neighbouring_rows_come_from_memory(server, www):
    opened = ShardSet.open(server.url + "/set", QUICK)
    server.asked.clear()
    reader = SampleReader(opened)
    for row in range(40):
        reader.read(row)
    counters = reader.source.counters
    assert counters["cache_misses"] == 1 and counters["cache_hits"] == 39
    tar = [span for name, span in server.asked if name.endswith(".tar")]
    assert len(tar) == 2  # the state, and one block
    # Nothing is fetched twice, nor beyond what the 40 rows hold.
    assert counters["bytes_read"] <= opened.shards[0].bytes


def test_a_batch_is_asked_for_at_once(tmp_path):
    write_shards(tmp_path / "www", 80, 10)
    with FaultyServer(tmp_path / "www") as server:
        opened = ShardSet.open(server.url, QUICK)
        server.delay_s = 0.05
        rows = list(range(5, 80, 10))
        opened.fetch_indices(range(8))
        assert server.busiest >= 4
        asked = Counter(name for name, _ in server.asked if name.endswith(".idx"))
        assert len(asked) == 8 and max(asked.values()) == 2  # size, content
        server.busiest = 0
        reader = SampleReader(opened)
        reader.expect(rows)
        assert [reader.read(row).members == sample(row)[1] for row in rows] == [True] * 8
        assert server.busiest >= 4
        asked = Counter(name for name, _ in server.asked if name.endswith(".tar"))
        assert len(asked) == 8 and max(asked.values()) == 2  # version, bytes


def test_memory_of_the_read_ahead_is_bounded(tmp_path):
    from data_pipeline.shards.packer import ShardWriter

    with ShardWriter(tmp_path / "www", max_samples=500) as writer:
        for number in range(1000):
            writer.write(f"{number:04d}", {"bin": number.to_bytes(2, "big") * 5000})
    with FaultyServer(tmp_path / "www") as server:
        settings = QUICK.model_copy(update={"read_ahead_mib": 1, "block_kib": 256})
        reader = SampleReader(ShardSet.open(server.url, settings))
        most = 0
        for step in range(64):  # 15 lanes of 64 rows side by side: more than 1 MiB holds at first
            for lane in range(15):
                row = 64 * lane + step
                assert reader.read(row).members["bin"][:2] == row.to_bytes(2, "big")
                source = reader.source
                held = sum(len(stretch.data) for stretch in source._stretches)
                most = max(most, source._in_memory, held)
        assert most <= 1.3 * 2**20
        # Blocks became as small as it takes, so that hardly anything was fetched twice.
        assert source.counters["bytes_read"] < 1.6 * 960 * 10_752
        assert source.counters["cache_hits"] > 0.6 * 960


FAULTS = [
    dropped,
    short,
    status(503),
    shifted,
    status(429, Retry_After="0"),
    whole,
    status(403),
    slow(0.05),
    short,
    dropped,
    status(500),
    slow(2.5),
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_the_local_ones_whatever_heals(tmp_path, workers, caplog):
    caplog.set_level(logging.CRITICAL)
    local = pack(tmp_path / "www", 103)
    expected = contents(loader(local, workers=0))
    with FaultyServer(tmp_path / "www") as server:
        assert contents(loader(ShardSet.open(server.url, QUICK), workers=workers)) == expected
        remote = ShardSet.open(server.url + "/test-00000{0..4}.tar", QUICK)
        server.faults.extend(FAULTS)
        assert contents(loader(remote, workers=workers)) == expected
        assert not server.faults  # every one of them was met
        resumed = contents(loader(remote, 7, workers=workers))
        assert resumed == {place: found for place, found in expected.items() if place[0] >= 7}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_away_ends_the_loader_in_time(tmp_path, workers, caplog):
    caplog.set_level(logging.CRITICAL)
    pack(tmp_path / "www", 103)
    settings = QUICK.model_copy(update={"retry_deadline_s": 1.0})
    with FaultyServer(tmp_path / "www") as server:
        windows = iter(loader(ShardSet.open(server.url, settings), workers=workers))
        server.always = status(503)
        started = time.monotonic()
        message = r"^rank 0, step 0: task a, .*\.tar: HTTP 503 .*deadline 1 s\)$"
        with pytest.raises(TransientReadError, match=message) as found:
            next(windows)
        stack = "".join(traceback.format_exception(found.value))
        assert "in _read_once" in stack  # also where a worker met it
        # Its own second of patience, or the five minutes of the default: a busy machine is neither.
        assert time.monotonic() - started < 150
    assert not multiprocessing.active_children()


def test_a_source_forgets_what_it_read_ahead(server):
    source = RemoteRanges(ShardSet.open(server.url + "/set", QUICK))
    first = source.pread(0, 0, 512)
    assert source._stretches
    source.close()
    assert not source._stretches and source.pread(0, 0, 512) == first


def test_an_index_file_says_whether_it_knows_the_payloads(server, www, tmp_path):
    without_companions(www / "set")
    weak = ShardSet.open(server.url + "/set/train-000000.tar", QUICK).index(0)
    save_index(weak, tmp_path / "weak.idx")
    loaded = load_index(tmp_path / "weak.idx")
    assert not loaded.payloads_hashed and loaded.digest == weak.digest
