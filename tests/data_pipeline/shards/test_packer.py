"""Packed shards: any tar reader reads them, their bytes depend on samples alone, none looks
finished early."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.packer import END_OF_ARCHIVE, ShardWriter, sample_bytes
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.small_shards import sample, write_shards


def test_webdataset_reads_what_we_write(tmp_path):
    write_shards(tmp_path, 25, 10)
    urls = str(tmp_path / "train-{000000..000002}.tar")
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(theirs) == 25
    for number, found in enumerate(theirs):
        key, members = sample(number)
        assert found["__key__"] == key
        assert {e: found[e] for e in members} == members


def test_gnu_tar_reads_what_we_write(tmp_path):
    write_shards(tmp_path / "s", 5, 5)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["tar", "-xvf", "../s/train-000000.tar"],
        cwd=tmp_path / "out",
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and len(done.stdout.split()) == 15
    assert (tmp_path / "out" / "000003.jpg").read_bytes() == sample(3)[1]["jpg"]


segments = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/."),
    min_size=1,
    max_size=120,
)
keys = st.lists(segments, min_size=1, max_size=3).map("/".join)
extensions = st.sampled_from(["jpg", "seg.png", "json", "txt", "x1"])


@given(
    st.lists(
        st.tuples(keys, st.dictionaries(extensions, st.binary(max_size=600), min_size=1)),
        max_size=5,
        unique_by=lambda s: s[0],
    )
)
@settings(max_examples=60, deadline=None)
def test_any_sample_comes_back(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("any")
    kept = []
    with ShardWriter(folder, max_samples=2) as writer:
        for key, members in samples:
            try:
                writer.write(key, members)
            except ValueError:
                assert key.startswith("__")
            else:
                kept.append((key, members))
    if not kept:
        return
    reader = SampleReader(ShardSet.open(folder))
    found = [reader.read(row) for row in range(len(kept))]
    assert [(s.key, s.members) for s in found] == kept
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = webdataset.WebDataset(urls, shardshuffle=False)
    assert [s["__key__"] for s in theirs] == [key for key, _ in kept]
    for path in folder.glob("*.tar"):
        assert build_index(path).digest == build_index_digest(folder, path.name)


def build_index_digest(folder, name):
    return next(r.index_digest for r in Manifest.load(folder).shards if r.name == name)


def test_bytes_depend_on_samples_only(tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, 12, 5)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o444)


def test_shards_end_at_max_samples(tmp_path):
    assert [s.samples for s in write_shards(tmp_path, 10, 4).shards] == [4, 4, 2]
    assert [s.name for s in ShardSet.open(tmp_path).shards][2] == "train-000002.tar"


def test_shards_stay_below_max_bytes(tmp_path):
    with ShardWriter(tmp_path, max_bytes=9000) as writer:
        for number in range(40):
            writer.write(*sample(number))
    shards = ShardSet.open(tmp_path)
    assert len(shards) == 40 and all(s.bytes <= 9000 for s in shards.shards)
    # As full as possible: the first sample of each shard did not fit into the one before.
    first = 0
    for before, after in zip(shards.shards, shards.shards[1:], strict=False):
        first += before.samples
        key, members = sample(first)
        assert before.bytes + sample_bytes(key, {e: len(p) for e, p in members.items()}) > 9000
        assert after.samples


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path):
    with ShardWriter(tmp_path, max_bytes=5000) as writer:
        for number, size in enumerate([10, 20_000, 10]):
            writer.write(str(number), {"jpg": bytes(size)})
    assert [s.samples for s in ShardSet.open(tmp_path).shards] == [1, 1, 1]


def test_sample_bytes_is_exact(tmp_path):
    with ShardWriter(tmp_path) as writer:
        total = 0
        for key in ("a", "long" * 60, "é"):
            members = {"jpg": bytes(513), "json": b"{}"}
            writer.write(key, members)
            total += sample_bytes(key, {"jpg": 513, "json": 2})
    size = (tmp_path / "shard-000000.tar").stat().st_size
    assert size == total + len(END_OF_ARCHIVE)


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("", {"jpg": b""}, "unsafe key"),
        ("/a", {"jpg": b""}, "unsafe key"),
        ("a/../b", {"jpg": b""}, "unsafe key"),
        ("a.b", {"jpg": b""}, "must have no dot"),
        ("__meta__/a", {"jpg": b""}, "not begin like '__meta__'"),
        ("a/", {"jpg": b""}, "would not be read back"),
        ("a", {}, "has no members"),
        ("a", {"JPG": b""}, "lower-case extension"),
        ("a", {"": b""}, "lower-case extension"),
        ("a", {"a/b": b""}, "lower-case extension"),
        ("0", {"jpg": b""}, "appears twice"),
    ],
)
def test_samples_that_others_would_misread_are_refused(tmp_path, key, members, message):
    writer = ShardWriter(tmp_path)
    writer.write("0", {"jpg": b""})
    with pytest.raises(ValueError, match=message):
        writer.write(key, members)


def test_after_an_error_nothing_looks_finished(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, max_samples=2) as writer:
        for number in range(3):
            writer.write(*sample(number))
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "shard-000000.tar",
        "shard-000000.tar.idx",
    ]


def test_a_shard_appears_whole_and_after_its_index(tmp_path, monkeypatch):
    seen = []

    def replace(source, target):
        assert not os.path.exists(target)
        if str(target).endswith(".tar"):
            assert os.path.exists(f"{target}.idx")
            seen.append(Path(source).read_bytes())
        original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace)
    write_shards(tmp_path, 6, 3)
    assert seen == [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))]
    assert len(seen) == 2


def test_full_folders_are_not_overwritten(tmp_path):
    write_shards(tmp_path, 3, 3)
    with pytest.raises(FileExistsError, match="write shards to an empty folder"):
        ShardWriter(tmp_path, "train")


@pytest.mark.parametrize("limits", [{"max_samples": 0}, {"max_bytes": 0}])
def test_limits_must_be_positive(tmp_path, limits):
    with pytest.raises(ValueError, match="must be positive"):
        ShardWriter(tmp_path, **limits)


def test_manifest(tmp_path):
    about = {"licence": "CC0", "command": "make it", "classes": ["a", "b"], "details": {"seed": 3}}
    with ShardWriter(tmp_path, **about) as writer:
        writer.write("0", {"jpg": b"", "json": b'{"label": 1}'})
        writer.write("1", {"json": b"{}"})
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: content[name] for name in about} == about
    assert content["fields"] == {"jpg": 1, "json": 2} and content["columns"] == ["label"]
    assert (content["samples"], len(content["shards"])) == (2, 1)


def test_members_keep_their_order(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("0", {"z": b"1", "a": b"2", "m": b"3"})
    data = (tmp_path / "shard-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["0.z", "0.a", "0.m"]
