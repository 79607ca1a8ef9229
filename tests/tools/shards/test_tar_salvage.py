"""`repack --on-damage skip` saves whole samples of damaged tars, and names all others."""

import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.shards.tar import BLOCK
from data_pipeline.storage.errors import ShardError
from tools.make_shards.run import LEFT_OUT_NAME
from tools.shards.__main__ import main
from tools.shards.tar_salvage import salvage

SAMPLES = 4
# Blocks of a sample: headers, a payload of three blocks and one of one.
LENGTH = (1 + 3 + 1 + 1) * BLOCK


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def members(number: int) -> dict[str, bytes]:
    return {"jpg": bytes([65 + number]) * 1300, "txt": b"text %d" % number}


def archive(numbers=range(SAMPLES), name="{}") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            for extension, payload in members(number).items():
                member = tarfile.TarInfo(f"{name.format(number)}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    return file.getvalue()


def saved(folder: Path, data: bytes) -> tuple[list[tuple[str, dict[str, bytes]]], str]:
    """(key, members) of the samples that are saved from a tar, and what is said of all others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.tar").write_bytes(data)
    found = salvage(str(folder / "x.tar"), folder / "links")
    samples = []
    for link in found.links:  # read as any other shard, by the index beside it
        shards = ShardSet.open(link)
        with SampleReader(shards) as reader:
            samples += [(s.key, s.members) for s in map(reader.read, range(len(shards)))]
    assert len(samples) == found.samples
    return samples, "\n".join(found.lost)


def whole(*numbers: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(str(number), members(number)) for number in numbers]


def test_every_cut_saves_the_samples_before_it(tmp_path):
    """In a header, a payload, its padding, or behind a member."""
    data = archive()
    for size in range(LENGTH, SAMPLES * LENGTH + BLOCK, 384):
        found, text = saved(tmp_path / str(size), data[:size])
        # The last payload is whole with as much of its padding as there is.
        done = min(SAMPLES, (size + BLOCK - len(members(0)["txt"])) // LENGTH)
        assert found == whole(*range(done)), size
        inside = size - done * LENGTH
        if inside >= BLOCK and done < SAMPLES:
            assert f"'{done}" in text, size  # a member whose header is there is named
        if inside > 0 and done < SAMPLES:
            assert text, size


def test_joined_archives_are_saved_whole(tmp_path):
    """With the end marker of the first one, and with half of it; what they share is told apart."""
    data = archive([0, 1])
    for end in (2 * LENGTH + BLOCK, None):
        found = saved(tmp_path / str(end), data[:end] + archive([1, 2]))
        assert found == (whole(0, 1, 1, 2), "")


@pytest.mark.parametrize("cut", [200, BLOCK, BLOCK + 100, 3 * BLOCK, 5 * BLOCK, 5 * BLOCK + 3])
def test_a_cut_archive_in_front_of_another_one(tmp_path, cut):
    """Its last member would have the headers of the other archive among its bytes."""
    found, text = saved(tmp_path, archive([0, 1])[: LENGTH + cut] + archive([1, 2, 3]))
    assert found == whole(0, 1, 2, 3)
    assert "'1" in text or cut < BLOCK


def test_links_and_tars_in_tars_are_no_samples(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        inner = archive([0])
        for name, payload in (("0.tar", inner), ("1.tar", inner), ("2.tar", inner)):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
            link = tarfile.TarInfo(f"link{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "0.tar"
            tar.addfile(link)
    data = file.getvalue()[: 2 * (2 * BLOCK + len(inner)) + 3 * BLOCK]  # inside of the third
    found, text = saved(tmp_path, data)
    assert found == [("0", {"tar": inner}), ("1", {"tar": inner})]
    assert "'link0.tar' is a symbolic link" in text and "member '2.tar' needs" in text


@pytest.mark.parametrize("damage", ["flipped", "zeros", "junk"])
@pytest.mark.parametrize("member", ["jpg", "txt"])
def test_a_damaged_header_costs_its_sample(tmp_path, damage, member):
    at = LENGTH + (0 if member == "jpg" else 4 * BLOCK)
    data = bytearray(archive())
    if damage == "flipped":
        data[at + 130] ^= 1
    else:
        data[at : at + BLOCK] = (b"\0" if damage == "zeros" else b"#") * BLOCK
    found, text = saved(tmp_path, bytes(data))
    assert found == whole(0, 2, 3)
    assert "sample '1': may have lost" in text


def test_long_names_whose_header_is_lost_are_not_guessed(tmp_path):
    data = bytearray(archive(name="d" * 90 + "/" + "é" * 60 + "{}"))
    data[0] ^= 1  # of the extended header of the first member
    found, text = saved(tmp_path, bytes(data))
    assert [key[90:] for key, _ in found] == [f"/{'é' * 60}{n}" for n in (1, 2, 3)]
    assert "has lost its long name" in text


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_nothing_that_is_saved_is_wrong(tmp_path_factory, data):
    """Whatever is cut out: the bytes are those that were packed, and others stay untouched."""
    first = bytearray(archive([0, 1])[: data.draw(st.integers(BLOCK, 2 * LENGTH))])
    begin = data.draw(st.integers(0, len(first)))
    del first[begin : begin + data.draw(st.integers(0, 2 * BLOCK))]
    found, _ = saved(tmp_path_factory.mktemp("salvage"), bytes(first) + archive([2, 3]))
    for key, content in found:
        # A payload that lacks bytes has the right length, but not the right ones: no tar tells.
        assert all(len(content[e]) == len(members(int(key))[e]) for e in content)
    assert found[-2:] == whole(2, 3)


@pytest.mark.parametrize(
    "kind", ["joined", "same keys", "no end", "cut header", "cut payload", "bad header"]
)
def test_the_advice_can_be_followed(tmp_path, monkeypatch, kind):
    """The error of whoever reads the tar names the command; what it writes can be read."""
    monkeypatch.chdir(tmp_path)
    data = archive([0, 1])
    cut = {"no end": 2 * LENGTH, "cut header": LENGTH + 100, "cut payload": LENGTH + 900}
    bad = bytearray(data)
    bad[LENGTH] ^= 1
    tar = {"joined": data + archive([2, 3]), "same keys": data + data, "bad header": bytes(bad)}
    Path("my shard.tar").write_bytes(tar.get(kind, data[: cut.get(kind)]))
    with pytest.raises(ShardError) as error:
        ShardSet.open("my shard.tar")
    (command,) = re.findall("`python -m tools.shards ([^`]*)`", str(error.value))
    assert main([*shlex.split(command), "--processes", "1"]) == 0
    count = {"joined": 4, "same keys": 4, "no end": 2}.get(kind, 1)
    assert len(ShardSet.open("saved/train")) == count
    details = Manifest.load("saved/train").details
    assert details["saved_of_damaged_shards"] == {"my shard.tar": count}
    named = Path("saved/train", LEFT_OUT_NAME)
    lost = named.read_text(encoding="utf-8").splitlines() if named.exists() else []
    assert details["missing"] == len(lost) and bool(lost) == (count == 1)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>" * 64, archive([0])[:100]])
def test_nothing_whole_is_an_error_that_names_the_tar(tmp_path, data, capsys):
    (tmp_path / "x.tar").write_bytes(data)
    words = ["repack", tmp_path / "x.tar", "--out", tmp_path / "out", "--on-damage", "skip"]
    assert main([*map(str, words)]) == 1
    assert "x.tar: byte 0" in capsys.readouterr().err


def test_a_shard_of_ours_that_was_cut_is_saved_beside_whole_ones(tmp_path):
    """It has an index and a manifest, which describe what is no longer there."""
    for name, numbers in (("a", [0, 1]), ("b", [2, 3])):
        (tmp_path / f"{name}.tar").write_bytes(archive(numbers))
    pack = [
        "repack",
        str(tmp_path / "a.tar"),
        str(tmp_path / "b.tar"),
        "--out",
        str(tmp_path / "set"),
        "--max-samples",
        "2",
        "--keep-order",
    ]
    assert main(pack) == 0
    path = tmp_path / "set" / "train" / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: LENGTH + 700])
    again = ["repack", str(tmp_path / "set" / "train"), "--on-damage", "skip", "--out"]
    assert main([*again, str(tmp_path / "new"), "--processes", "2", "--max-samples", "1"]) == 0
    shards = ShardSet.open(tmp_path / "new" / "train")
    with SampleReader(shards) as reader:
        found = [(s.key, s.members) for s in map(reader.read, range(len(shards)))]
    assert sorted(found, key=lambda one: one[0]) == whole(0, 1, 2)
    assert "'3" in (tmp_path / "new" / "train" / LEFT_OUT_NAME).read_text(encoding="utf-8")
