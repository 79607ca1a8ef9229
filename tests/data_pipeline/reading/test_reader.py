"""Samples come back whole by row number; what is damaged, missing, replaced or away is told
apart."""

import errno
import multiprocessing
import os
import pickle
import time

import pytest

from data_pipeline.reading.local_files import LocalFiles
from data_pipeline.reading.reader import BadSample, SampleReader, TransientReadError
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.small_shards import sample, write_shards


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write_shards(tmp_path / "set", 10, 4)


def flip(path, byte):
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 8]))


def test_every_sample_comes_back(shards):
    with SampleReader(shards) as reader:
        for row in (9, 0, 5, 4, 3, 3, 8):
            read = reader.read(row)
            key, members = sample(row)
            assert (read.row, read.key, read.members) == (row, key, members)
            assert list(read.members) == list(members)
            assert read.shard == shards.shards[row // 4].path


def test_only_wanted_members_are_read(shards):
    reader = SampleReader(shards)
    assert reader.read(7, ["json", "txt"]).members == {"json": sample(7)[1]["json"]}
    assert reader.read(7, {"txt"}).members == {}


def test_members_far_apart_are_read_without_what_lies_between(tmp_path, monkeypatch):
    members = {"txt": b"t", "mp4": bytes(3 << 20), "cls": b"1", "json": b"{}"}
    with ShardWriter(tmp_path) as writer:
        writer.write("0", members)
    reader = SampleReader(ShardSet.open(tmp_path))
    lengths = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: lengths.append(n) or pread(fd, n, at))
    read = reader.read(0, {"txt", "cls", "json"}).members
    assert read == {e: members[e] for e in ("txt", "cls", "json")}
    assert len(lengths) == 2 and sum(lengths) < 4096
    assert reader.read(0).members == members


def test_rows_that_do_not_exist(shards):
    with pytest.raises(IndexError, match="row 10"):
        SampleReader(shards).read(10)


def test_damaged_payload(shards):
    _, offset, size, _, _ = shards.index(1).members(2)[0]
    flip(shards.shards[1].path, offset + size - 1)
    reader = SampleReader(shards)
    with pytest.raises(
        BadSample, match=r"000001\.tar: sample '000006' \(row 6\): member \.jpg"
    ) as c:
        reader.read(6)
    assert (c.value.row, c.value.key, c.value.shard) == (6, "000006", shards.shards[1].path)
    # What is not damaged stays readable.
    assert reader.read(6, {"json"}).members["json"] == sample(6)[1]["json"]
    assert reader.read(5).members == sample(5)[1]


def test_damaged_header(shards):
    flip(shards.shards[0].path, 130)  # a digit of the size of the first member
    with pytest.raises(BadSample, match=r"sample '000000' .*byte 0: this is not a tar header"):
        SampleReader(shards).read(0)


def test_a_shard_replaced_by_one_of_equal_size(tmp_path):
    def write(folder, letter):
        with ShardWriter(folder) as writer:
            writer.write(f"{letter}0", {"txt": b"same"})
            writer.write(f"{letter}1", {"txt": b"same"})

    write(tmp_path / "a", "a")
    write(tmp_path / "b", "b")
    shards = ShardSet.open(tmp_path / "a")
    shards.index(0)
    os.replace(tmp_path / "b" / "shard-000000.tar", tmp_path / "a" / "shard-000000.tar")
    with pytest.raises(BadSample, match=r"'a1'.* holds the header of 'b1\.txt' .*was replaced"):
        SampleReader(shards).read(1)


def test_truncated_before_and_after_opening(shards):
    path = shards.shards[2].path
    reader = SampleReader(shards)
    reader.read(8)
    begin, _ = shards.index(2).span(1)
    os.truncate(path, begin + 600)
    with pytest.raises(BadSample, match=f"row 9.*the shard ends at byte {begin + 600}: truncated"):
        reader.read(9)
    with pytest.raises(BadSample, match=r"row 8.*has \d+ bytes, but its index describes \d+"):
        SampleReader(shards).read(8)


def test_a_damaged_index_is_a_bad_sample(shards):
    flip(shards.shards[0].path + ".idx", 1500)
    with pytest.raises(BadSample, match=r"\(row 1\): .*000000\.tar\.idx: damaged"):
        SampleReader(shards).read(1)


def test_transient_errors_are_retried(shards, monkeypatch):
    failures = [errno.EIO, errno.ESTALE]
    pread = os.pread

    def flaky(*arguments):
        if failures:
            raise OSError(failures.pop(), "flaky")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", flaky)
    assert SampleReader(shards, first_wait_s=0.001).read(3).members == sample(3)[1]
    assert not failures


def test_lasting_errors_end_the_run(shards, monkeypatch):
    def broken(*arguments):
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr(os, "pread", broken)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(TransientReadError, match=r"000000\.tar: disk on fire \(tried 4 times\)"):
        SampleReader(shards, retries=3, first_wait_s=0.5).read(0)
    assert waits == [0.5, 1.0, 2.0]


def test_a_missing_shard_is_looked_for_once_and_then_all_its_samples_are_bad(shards, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    os.unlink(shards.shards[1].path)
    reader = SampleReader(shards)
    for row in (5, 4, 7):
        with pytest.raises(BadSample, match=r"the shard cannot be opened: No such file") as caught:
            reader.read(row)
        assert (caught.value.key, caught.value.row) == (f"{row:06d}", row)
        assert caught.value.shard == shards.shards[1].path
    assert waits == [0.5, 1.0]
    assert reader.read(3).members == sample(3)[1]


def test_a_shard_that_comes_back_meanwhile_is_read(shards, monkeypatch):
    path = shards.shards[1].path
    os.rename(path, f"{path}.away")
    monkeypatch.setattr(time, "sleep", lambda s: os.rename(f"{path}.away", path))
    assert SampleReader(shards).read(5).members == sample(5)[1]


def test_a_shard_that_may_not_be_read_is_bad(shards, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    SampleReader(shards).read(4)  # maps the index
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(BadSample, match=r"'000005' .*cannot be opened: Permission denied"):
        SampleReader(shards, first_wait_s=0.001).read(5)


@pytest.mark.parametrize("gone", ["folder", "content"])
def test_storage_that_is_away_as_a_whole_is_no_fault_of_the_data(shards, gone, tmp_path):
    os.rename(tmp_path / "set", tmp_path / "elsewhere")
    if gone == "content":
        (tmp_path / "set").mkdir()  # as a mount point without its file system
    with pytest.raises(TransientReadError, match=r"000001\.tar: No such file.*tried 4 times"):
        SampleReader(shards, retries=3, first_wait_s=0.001).read(5)


def test_a_member_above_the_limit_is_not_read(shards, monkeypatch):
    size = len(sample(9)[1]["jpg"])
    reader = SampleReader(shards, max_member_bytes=size - 1)
    monkeypatch.setattr(os, "pread", None)
    with pytest.raises(BadSample, match=rf"\.jpg has {size} bytes, more than max_member_bytes"):
        reader.read(9)
    monkeypatch.undo()
    assert SampleReader(shards, max_member_bytes=size).read(9).members == sample(9)[1]
    assert reader.read(9, {"cls"}).members == {"cls": sample(9)[1]["cls"]}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_files_are_bounded_and_closed(tmp_path):
    shards = write_shards(tmp_path, 20, 1)
    before = open_descriptors()
    reader = SampleReader(shards, LocalFiles(shards, open_files=3))
    for row in [*range(20), *range(20)]:
        reader.read(row)
    assert open_descriptors() == before + 3
    reader.close()
    assert open_descriptors() == before
    assert reader.read(5).key == "000005"
    del reader
    assert open_descriptors() == before


def read_all(reader, queue):
    queue.put([reader.read(row).members == sample(row)[1] for row in range(10)])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_use_in_other_processes(shards, method):
    reader = SampleReader(shards)
    reader.read(0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_all, args=(reader, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(20):
        for row in range(10):
            reader.read(row)
    assert [queue.get(timeout=60) for _ in workers] == [[True] * 10] * 2
    for worker in workers:
        worker.join()


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(BadSample("torn", "x.tar", "cat", 3)))
    assert str(error) == "x.tar: sample 'cat' (row 3): torn" and error.row == 3
