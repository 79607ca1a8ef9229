"""Streams without addresses: what they do not promise, and what they do."""

import gzip
import json
import logging
import multiprocessing
import os
import pickle
import shlex
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import DataError, LoaderSettings, StepLoader
from data_pipeline.loader.weak_stream import WeakStream, part_of
from data_pipeline.reading.webdataset_reader import ShardFault, streamed_samples
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.storage.retry import RetryPolicy
from data_pipeline.storage.storage import TransientReadError
from tests.data_pipeline.photos import jpeg, pack, picture, tokenizer
from tests.data_pipeline.storage.faulty_server import FaultyServer

QUICK = RetryPolicy(0.3, 1.0, 0.01, 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 samples in 6 shards."""
    path = tmp_path_factory.mktemp("shards")
    pack(path, 60, per_shard=10)
    return path


def urls(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def stream(shards: list[str], batch: int = 12, micro: int = 4, **options) -> WeakStream:
    settings = CaptionDataSettings(shards=["unused"], image=ImageSettings(size=16))
    fields = CaptionProcessor(settings, tokenizer(), True)
    options = {"shuffle_samples": 5, "retry": QUICK} | options
    return WeakStream("t", shards, fields, 7, batch, micro, **options)


def windows(weak: WeakStream, steps: int, rank=0, world=1, start=0, **options) -> list:
    settings = LoaderSettings(**{"workers": 0, "max_bad_fraction": 1.0, **options})
    loader = StepLoader(
        {"t": weak}, lambda step: ("t", step), settings, rank, world, start, start + steps
    )
    found = list(loader)
    windows.faults = loader.faults()
    return found


def keys(found: list) -> list[str]:
    batches = [batch for window in found for batch in window.micro_batches]
    return [
        key
        for batch in batches
        for key, valid in zip(batch["key"], batch["valid"], strict=True)
        if valid
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_all_ranks_have_equal_batches_and_read_other_samples(folder, world, workers):
    ranks = [
        windows(stream(urls(folder), 12, 4), 5, rank, world, workers=workers)
        for rank in range(world)
    ]
    shapes = {tuple(len(b["valid"]) for w in found for b in w.micro_batches) for found in ranks}
    assert len(shapes) == 1
    everything = [key for found in ranks for key in keys(found)]
    assert len(everything) == 60
    # 60 positions, 60 samples; a share that is through begins again, so that some come twice.
    assert len(set(everything)) > 40
    first_pass = [set(keys(found)[:10]) for found in ranks]
    assert not any(a & b for a in first_pass for b in first_pass if a is not b)


def test_one_process_reads_every_sample_before_any_comes_again(folder):
    assert sorted(keys(windows(stream(urls(folder), shuffle_samples=1), 5))) == [
        f"{number:05d}" for number in range(60)
    ]


@pytest.mark.parametrize(("shards", "slots"), [(1, 1), (6, 4), (3, 8), (1, 5), (7, 7)])
def test_shards_are_shared_out(shards, slots):
    taken = Counter()
    for slot in range(slots):
        part = part_of(shards, slot, slots)
        assert part
        for shard, turn, sharers in part:
            assert 0 <= turn < sharers
            taken.update((shard, place) for place in range(turn, 840, sharers))
    assert len(taken) == 840 * shards and set(taken.values()) == {1}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fewer_shards_than_readers(folder):
    weak = [urls(folder)[0], urls(folder)[1]]
    found = [keys(windows(stream(weak, 10, 2, shuffle_samples=1), 1, rank, 5)) for rank in range(5)]
    together = [key for part in found for key in part]
    assert len(together) == 10 and len(set(together)) == 10


def test_a_resume_says_that_it_reads_another_part(folder, caplog):
    whole = keys(windows(stream(urls(folder), shuffle_samples=1), 4))
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        rest = keys(windows(stream(urls(folder), shuffle_samples=1), 2, start=2))
        again = keys(windows(stream(urls(folder), shuffle_samples=1), 2, start=2))
    assert len(rest) == 24 and rest == again and rest != whole[24:]
    text = caplog.text
    assert "promises less: no fixed order" in text and "no equal epochs" in text
    assert "goes on at step 2 with another part of its stream" in text


def test_commands_compressed_tars_and_addresses_give_the_same_samples(folder, tmp_path):
    (path,) = urls(folder)[:1]
    packed = tmp_path / "x.tar.gz"
    with open(path, "rb") as source, gzip.open(packed, "wb") as target:
        shutil.copyfileobj(source, target)
    expected = [(s.key, s.members) for s in streamed_samples(path, 0)]
    assert len(expected) == 10 and set(expected[0][1]) == {"jpg", "txt", "json"}
    unzip = f"pipe:gzip -dc {shlex.quote(str(packed))}"
    forms = [f"pipe:cat {shlex.quote(path)}", str(packed), unzip]
    for form in forms:
        assert [(s.key, s.members) for s in streamed_samples(form, 0)] == expected
    if shutil.which("curl"):
        with FaultyServer(tmp_path) as server:
            found = streamed_samples(server.url + "/x.tar.gz", 0)
            assert [(s.key, s.members) for s in found] == expected


def test_what_tarfile_takes_for_the_end_is_noticed(folder, tmp_path):
    (path,) = urls(folder)[:1]
    content = Path(path).read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    damaged = bytearray(content)
    damaged[headers[9] + 150] ^= 1
    cases = {
        "header": (bytes(damaged), "data behind the end of the archive"),
        "boundary": (content[: headers[9]], "without an end-of-archive marker"),
        "inside": (content[: headers[9] + 900], "unexpected end of data"),
        "empty": (b"", "."),
        "other": (b"not a tar" * 999, "."),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        found = []
        with pytest.raises(ShardFault) as caught:
            for sample in streamed_samples(str(tmp_path / name), 0):
                found.append(sample)
        assert reason in caught.value.reason or reason == ".", caught.value.reason
        assert len(found) <= 4
    with pytest.raises(ShardFault, match="No such file") as caught:
        list(streamed_samples(str(tmp_path / "none.tar"), 0))


def test_a_command_that_fails_is_named_without_its_secrets(folder):
    (path,) = urls(folder)[:1]
    for command in (f"cat {shlex.quote(path)}; true hush; exit 7", "true hush; exit 7"):
        with pytest.raises(ShardFault) as caught:
            list(streamed_samples(f"pipe:{command}", 3))
        assert "(shard 3)" in caught.value.shard and "hush" not in str(caught.value)
    with pytest.raises(ShardFault, match="ended with status 7"):
        list(streamed_samples(f"pipe:cat {shlex.quote(path)}; exit 7", 3))


def write_photos(folder: Path, count: int, bad: list[int]) -> None:
    """Ten samples a shard; the images of `bad` are none."""
    with ShardWriter(folder, "test", max_samples=10) as writer:
        for number in range(count):
            image = b"no image" if number in bad else jpeg(picture(number))
            writer.write(f"{number:05d}", {"jpg": image, "txt": b"a boat"})


def test_bad_samples_and_bad_shards_are_skipped_counted_and_named(tmp_path, caplog):
    write_photos(tmp_path, 60, bad=[3, 44])
    os.truncate(urls(tmp_path)[2], 5000)
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        found = windows(stream(urls(tmp_path), shuffle_samples=1), 5)
    assert len(keys(found)) == 60 and not {"00003", "00044"} & set(keys(found))
    assert 3 <= windows.faults["t"].replaced <= 8
    assert "bad sample replaced" in caplog.text and "key '00003'" in caplog.text
    assert "test-000002.tar" in caplog.text
    with pytest.raises(DataError, match=r"max_bad_fraction|max_bad_run"):
        windows(stream(urls(tmp_path), shuffle_samples=1), 500, max_bad_fraction=0.01)


def test_members_that_are_too_large_are_bad_samples(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for number in range(20):
            text = b"a boat" * (5000 if number == 3 else 1)
            writer.write(f"{number}", {"jpg": jpeg(picture(number)), "txt": text, "mp4": bytes(9)})
    small = stream(urls(tmp_path), shuffle_samples=1, max_member_bytes=29_000)
    assert "3" not in keys(windows(small, 3)) and windows.faults["t"].replaced == 2
    assert "max_member_bytes" in windows.faults["t"].last.reason


def test_too_many_bad_samples_end_the_run(tmp_path):
    write_photos(tmp_path, 20, bad=list(range(20)))
    with pytest.raises(DataError, match="101 samples in a row could not be used"):
        windows(stream(urls(tmp_path)), 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_all_fail_end_the_run_in_time(tmp_path, workers):
    gone = [f"pipe:cat {tmp_path}/gone-{number}.tar 2>/dev/null" for number in range(4)]
    with pytest.raises(TransientReadError, match=r"rank 0, step 0: .*no sample in a whole pass"):
        windows(stream(gone), 1, workers=workers)
    assert not multiprocessing.active_children()


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/omnipretrain-bomb-of-a-stream",))


def test_nothing_is_unpickled(tmp_path):
    bomb = pickle.dumps(Bomb())
    with ShardWriter(tmp_path) as writer:
        for number in range(4):
            image = jpeg(picture(number))
            record = json.dumps({"a": 1}).encode()
            members = {"jpg": image, "txt": b"a boat", "json": record, "pyd": bomb, "pth": bomb}
            writer.write(f"{number}", members | {"pickle": bomb, "npy": bomb})
    assert len(keys(windows(stream(urls(tmp_path)), 2))) == 24
    assert not os.path.exists("/tmp/omnipretrain-bomb-of-a-stream")


def test_leaving_early_ends_the_commands(folder):
    (path,) = urls(folder)[:1]
    weak = stream([f"pipe:cat {shlex.quote(path)}; exec sleep 600"], 4, 4, shuffle_samples=1)
    assert len(keys(windows(weak, 2))) == 8
    started = time.monotonic()
    weak.close()
    assert time.monotonic() - started < 300
