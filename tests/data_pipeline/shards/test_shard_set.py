"""A set of shards is rows and columns, however it was named; each index is built once, damage is
named."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry as loaded_drivers

from data_pipeline.shards import shard_set as shards_module
from data_pipeline.shards.manifest import Manifest, ShardRecord
from data_pipeline.shards.names import expand_specs
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import Shard, ShardSet, load_or_build_index
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.small_shards import sample, write_shards


@pytest.fixture
def foreign(tmp_path):
    """Three shards of 4, 4 and 2 samples without indices or manifest."""
    write_shards(tmp_path / "foreign", 10, 4)
    for path in (tmp_path / "foreign").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return tmp_path / "foreign"


@contextmanager
def read_only(folder: Path):
    """Make `folder` unwritable, also if the tests run as root: root gives up its rights here."""
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_rows_of_all_shards(tmp_path):
    shards = write_shards(tmp_path, 10, 4)
    assert len(shards) == 10 and [s.samples for s in shards.shards] == [4, 4, 2]
    assert [shards.locate(row) for row in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
    for row in (-1, 10):
        with pytest.raises(IndexError, match=f"row {row} of a data set with 10 samples"):
            shards.locate(row)


def test_empty_shards_in_between(tmp_path):
    shards = ShardSet(Shard(f"{n}.tar", n % 2, 0, "") for n in range(7))
    assert [shards.locate(row)[0] for row in range(3)] == [1, 3, 5]


def test_all_ways_to_name_the_same_shards(tmp_path, foreign, monkeypatch):
    write_shards(tmp_path / "packed", 10, 4)
    packed = ShardSet.open(tmp_path / "packed")
    folder = tmp_path / "foreign"
    names = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    monkeypatch.chdir(folder)
    for specs in (
        folder,
        str(folder / "train-{000000..000002}.tar"),
        [str(folder / "*-00000[01].tar"), folder / names[2]],
        "*.tar",
        names,
    ):
        opened = ShardSet.open(specs)
        assert [s.name for s in opened.shards] == names
        # Folder and order of naming do not matter, content does.
        assert opened.fingerprint == packed.fingerprint
    assert ShardSet.open(names[::-1]).fingerprint != packed.fingerprint


def test_specs_that_match_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"x-\*\.tar: no file matches"):
        ShardSet.open(str(tmp_path / "x-*.tar"))
    with pytest.raises(FileNotFoundError, match=r"neither a manifest\.json nor a \*\.tar"):
        ShardSet.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        ShardSet.open(tmp_path / "gone.tar")
    # As if the driver were not installed, also where an earlier test has loaded it.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(loaded_drivers, "s3", raising=False)
    with pytest.raises(ShardError, match=r"s3:// needs a driver .*pip install s3fs"):
        ShardSet.open("s3://bucket/{0..3}.tar")


def test_a_shard_listed_twice_is_refused(tmp_path):
    write_shards(tmp_path, 4, 2)
    first = tmp_path / "train-000000.tar"
    with pytest.raises(ShardError, match=r"000000\.tar: is listed twice"):
        ShardSet.open([str(tmp_path / "*.tar"), first])


def test_an_unfinished_folder_is_refused(tmp_path):
    write_shards(tmp_path, 4, 2)
    (tmp_path / "packing.json").write_text("{}")
    with pytest.raises(ShardError, match="packing is not finished"):
        ShardSet.open(tmp_path)


def test_columns_over_shards(tmp_path):
    shards = write_shards(tmp_path, 10, 4)
    np.testing.assert_array_equal(shards.column("width"), 10 + np.arange(10))
    with pytest.raises(KeyError, match=r"no column 'heigth'; there are .*width"):
        shards.column("heigth")


def test_a_column_that_some_shards_lack(tmp_path):
    with ShardWriter(tmp_path, max_samples=1) as writer:
        writer.write("0", {"json": b'{"a": 7}'})
        writer.write("1", {"json": b"{}"})
    np.testing.assert_array_equal(ShardSet.open(tmp_path).column("a"), [7, np.nan])


def test_foreign_shards_are_indexed_once(foreign, caplog):
    with caplog.at_level(logging.DEBUG, "omnipretrain.data"):
        first = ShardSet.open(foreign)
        said = [record.message for record in caplog.records]
        assert len(said) == 3 and all(line.startswith("indexing ") for line in said)
        assert ShardSet.open(foreign).fingerprint == first.fingerprint
        assert len(caplog.records) == 3
    assert sorted(p.name for p in foreign.glob("*.idx")) == [
        f"train-00000{n}.tar.idx" for n in range(3)
    ]


def test_opening_that_takes_long_says_how_far_it_is(foreign, caplog, monkeypatch):
    monkeypatch.setattr(shards_module, "_REPORT_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "omnipretrain.data"):
        ShardSet.open(foreign)
    said = [record.message[:20] for record in caplog.records]
    assert said == ["opened 1 of 3 shards", "opened 2 of 3 shards", "opened 3 of 3 shards"]


def test_the_index_of_a_read_only_folder_goes_to_the_cache(monkeypatch, foreign):
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to other users
        folder, cache = Path(top) / "data", Path(top) / "cache"
        shutil.copytree(foreign, folder)
        for path in folder.iterdir():  # also where the umask closes new files to other users
            path.chmod(0o644)
        cache.mkdir()
        for path in (Path(top), cache):
            path.chmod(0o777)
        monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(cache))
        with read_only(folder):
            opened = ShardSet.open(folder)
            assert len(opened) == 10
            assert len(list(folder.iterdir())) == 3
            assert len(list((cache / "indices").glob("*-train-00000?.tar.idx"))) == 3
            monkeypatch.setattr(shards_module, "build_index", None)  # must not be needed again
            assert ShardSet.open(folder).fingerprint == opened.fingerprint


def test_equal_names_in_two_read_only_folders_do_not_meet(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "indices").mkdir(parents=True)
    monkeypatch.setattr(shards_module, "_can_write_beside", lambda p: "cache" in p.parts)
    for name, count in (("a", 2), ("b", 3)):
        write_shards(tmp_path / name, count, 5)
        (tmp_path / name / "manifest.json").unlink()
        (tmp_path / name / "train-000000.tar.idx").unlink()
    assert [len(ShardSet.open(tmp_path / name)) for name in "abab"] == [2, 3, 2, 3]


def test_no_writable_place_is_a_clear_error(monkeypatch, foreign):
    monkeypatch.setattr(shards_module, "_can_write_beside", lambda place: False)
    with pytest.raises(ShardError, match="OMNIPRETRAIN_CACHE"):
        ShardSet.open(foreign)


def build_and_count(path, queue):
    built = []

    def counting(*arguments):
        built.append(1)
        return original(*arguments)

    original = shards_module.build_index
    shards_module.build_index = counting
    load_or_build_index(path)
    queue.put(len(built))


def test_of_many_processes_one_builds(foreign):
    path = str(foreign / "train-000000.tar")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=build_and_count, args=(path, queue)) for _ in range(6)]
    for worker in workers:
        worker.start()
    counts = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(counts) == 1
    assert sorted(p.name for p in foreign.iterdir() if "000000" in p.name) == [
        "train-000000.tar",
        "train-000000.tar.idx",
    ]


def test_leftovers_of_a_killed_builder_are_removed(foreign):
    stale = foreign / ".train-000000.tar.idx.4711-deadbeef.tmp"
    stale.write_bytes(b"half an index")
    (foreign / "train-000000.tar.idx.lock").touch()
    ShardSet.open(foreign)
    assert not stale.exists() and not list(foreign.glob("*.lock"))


def test_a_truncated_shard_is_named(foreign):
    ShardSet.open(foreign)
    path = foreign / "train-000001.tar"
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=r"train-000001\.tar: has \d+ bytes, but its index descr"):
        ShardSet.open(foreign)


def test_swapped_shards_are_named(tmp_path):
    shards = write_shards(tmp_path, 12, 4)
    one, two = (str(tmp_path / f"train-00000{n}.tar") for n in (0, 1))
    for suffix in ("", ".idx"):
        os.rename(one + suffix, tmp_path / "aside")
        os.rename(two + suffix, one + suffix)
        os.rename(tmp_path / "aside", two + suffix)
    opened = ShardSet.open(tmp_path)  # only the manifest is read here
    assert opened.fingerprint == shards.fingerprint
    with pytest.raises(ShardError, match=r"000000\.tar: its index does not belong"):
        opened.index(0)


def test_a_damaged_shard_is_read_once_only(tmp_path, monkeypatch):
    write_shards(tmp_path, 4, 4)
    (tmp_path / "train-000000.tar.idx").unlink()
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    shards = ShardSet.open(tmp_path)
    messages = []
    for _ in range(2):
        with pytest.raises(ShardError, match="byte 0: this is not a tar header") as caught:
            shards.index(0)
        messages.append(str(caught.value))
        monkeypatch.setattr(shards_module, "build_index", None)
    assert messages[0] == messages[1]


def test_mapped_indices_are_bounded(tmp_path):
    shards = write_shards(tmp_path, 12, 2)
    small = ShardSet(shards.shards, cached_indices=2)
    for row in range(12):
        assert small.index(small.locate(row)[0]).key(row % 2) == sample(row)[0]
    assert len(small._indices) == 2


def test_pickled_sets_are_small_and_equal(tmp_path):
    shards = write_shards(tmp_path, 10, 4)
    shards.index(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.fingerprint == shards.fingerprint and len(copy) == 10
    assert not copy._indices


def test_100000_shards_open_with_one_read(tmp_path, monkeypatch):
    count = 100_000
    records = [
        ShardRecord(f"s-{n:06d}.tar", 1000 + n % 7, 10**8, f"{n:064x}", f"{n:064x}")
        for n in range(count)
    ]
    Manifest(records).save(tmp_path)
    touched = []
    real_stat, real_open = os.stat, open
    monkeypatch.setattr(os, "stat", lambda p, **kw: touched.append(p) or real_stat(p, **kw))
    monkeypatch.setattr("builtins.open", lambda p, *a: touched.append(p) or real_open(p, *a))
    shards = ShardSet.open(tmp_path)
    monkeypatch.undo()
    assert len(touched) < 12
    assert len(shards) == sum(r.samples for r in records)
    assert shards.locate(len(shards) - 1) == (count - 1, records[-1].samples - 1)


def test_manifest_round_trip_and_damage(tmp_path):
    write_shards(tmp_path, 10, 4)
    manifest = Manifest.load(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    manifest.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert manifest.fields == {"cls": 10, "jpg": 10, "json": 10}
    lengths = [
        f"captions.{unit}.{end}" for unit in ("characters", "words") for end in ("max", "min")
    ]
    assert manifest.columns == sorted(["captions.count", "cls", "score", "width", *lengths])

    def change(**fields):
        content = json.loads(before) | fields
        (tmp_path / "manifest.json").write_text(json.dumps(content))

    for fields in ({"samples": 11}, {"version": 99}, {"shards": [{"name": "x"}]}, {"surprise": 1}):
        change(**fields)
        with pytest.raises(ShardError, match=r"manifest\.json: damaged"):
            Manifest.load(tmp_path)
    outside = manifest.shards[0]._replace(name="../x.tar")
    change(shards=[outside._asdict()], samples=outside.samples, bytes=outside.bytes)
    with pytest.raises(ShardError, match=r"'\.\./x\.tar' is not a file name"):
        Manifest.load(tmp_path)


def test_folders_with_magic_characters(tmp_path):
    folder = tmp_path / "odd[1]{a,b}name"
    write_shards(folder, 4, 2)
    assert len(expand_specs(folder)) == 2
