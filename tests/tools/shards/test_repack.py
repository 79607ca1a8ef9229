"""Samples into other shards: merged, filtered, split, shuffled; their bytes unchanged."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.shards.test_packing import contents
from tests.data_pipeline.small_shards import sample, write_shards
from tools.shards.__main__ import main


def run(*arguments) -> int:
    return main(["repack", *(str(argument) for argument in arguments), "--processes", "1"])


def read_all(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members, in storage order."""
    shards = ShardSet.open(folder)
    with SampleReader(shards) as reader:
        return {s.key: s.members for s in map(reader.read, range(len(shards)))}


def expected(*numbers: int) -> dict[str, dict[str, bytes]]:
    return dict(sample(number) for number in numbers)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "set", 40, 15)
    return tmp_path / "set"


def test_samples_stay_what_they_are_in_another_order(tmp_path, folder):
    assert run(folder, "--out", tmp_path / "a", "--max-samples", 7) == 0
    assert run(folder, "--out", tmp_path / "b", "--max-samples", 7, "--seed", 1) == 0
    found = read_all(tmp_path / "a" / "train")
    assert found == expected(*range(40))
    assert list(found) != sorted(found) and list(found) != list(read_all(tmp_path / "b" / "train"))
    manifest = Manifest.load(tmp_path / "a" / "train")
    assert len(manifest.shards) == 6
    (one,) = manifest.details["inputs"]
    assert one["fingerprint"] == ShardSet.open(folder).fingerprint and one["samples"] == 40
    assert run(folder, "--out", tmp_path / "c", "--keep-order", "--bundle", 4) == 0
    assert list(read_all(tmp_path / "c" / "train")) == sorted(found)
    assert ShardSet.open(tmp_path / "c" / "train").index(0).bundled
    assert run(tmp_path / "c" / "train", "--out", tmp_path / "d", "--keep-order") == 0
    unbundled = (tmp_path / "d" / "train" / "train-000000.tar").read_bytes()
    write_shards(tmp_path / "plain", 40, 40)
    assert unbundled == (tmp_path / "plain" / "train-000000.tar").read_bytes()


def test_the_command_in_the_manifest_makes_the_same_bytes(tmp_path, folder):
    options = ["--fractions", "train=0.75,val=0.25", "--where", "width > 12", "--max-bytes", "20k"]
    assert run(folder, "--out", tmp_path / "a", *options) == 0
    words = Manifest.load(tmp_path / "a" / "train").command
    assert words.startswith(f"python -m tools.shards repack {shlex.quote(str(folder))} --bundle 1")
    again = [*shlex.split(words)[3:], "--out", str(tmp_path / "b"), "--processes", "2"]
    assert main(again) == 0
    for split in ("train", "val"):
        assert contents(tmp_path / "a" / split) == contents(tmp_path / "b" / split)
        sizes = [shard.bytes for shard in Manifest.load(tmp_path / "a" / split).shards]
        assert max(sizes) <= 20_000


def test_a_killed_repack_goes_on(tmp_path, folder):
    assert run(folder, "--out", tmp_path / "a", "--max-samples", 7) == 0
    whole = contents(tmp_path / "a" / "train")
    (tmp_path / "a" / "train" / "train-000002.tar").unlink()
    assert run(folder, "--out", tmp_path / "a", "--max-samples", 7) == 0
    assert contents(tmp_path / "a" / "train") == whole
    shutil.rmtree(folder)
    write_shards(folder, 41, 15)
    assert run(folder, "--out", tmp_path / "a", "--max-samples", 7) == 1  # other input


def test_splits_are_a_function_of_the_key(tmp_path, folder, capsys):
    fractions = ["--fractions", "train=0.6,val=0.2"]
    assert run(folder, "--out", tmp_path / "a", *fractions) == 0
    parts = {name: set(read_all(tmp_path / "a" / name)) for name in ("train", "val")}
    assert not parts["train"] & parts["val"] and 10 < len(parts["train"]) < 35
    assert len(parts["train"] | parts["val"]) < 40  # a fifth is in neither
    write_shards(tmp_path / "more", 60, 60)
    assert run(tmp_path / "more", "--out", tmp_path / "b", *fractions) == 0
    for name, keys in parts.items():
        later = set(read_all(tmp_path / "b" / name))
        assert {key for key in later if int(key) < 40} == keys
    whole = ["--fractions", "a=0.3,b=0.3,c=0.4"]
    assert run(folder, "--out", tmp_path / "c", *whole) == 0
    assert sum(len(read_all(tmp_path / "c" / name)) for name in "abc") == 40
    assert run(folder, "--out", tmp_path / "d", "--fractions", "x=1e-9") == 1
    assert "split 'x' is empty" in capsys.readouterr().err
    assert run(folder, "--out", tmp_path / "e", "--fractions", "most=0.9999999,x=1e-9") == 1
    assert "split 'x' is empty" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()  # nothing is packed before all splits are known


@pytest.mark.parametrize("text", ["train", "a=0.5,a=0.5", "a=0.7,b=0.4", "a=0", "a=x", "../a=1"])
def test_fractions_that_are_none(folder, tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        run(folder, "--out", tmp_path / "a", "--fractions", text)
    assert "--fractions" in capsys.readouterr().err


def test_where_keeps_what_meets_the_condition(tmp_path, folder, capsys):
    condition = "captions.count == 3 and cls in [0, 1]"
    assert run(folder, "--out", tmp_path / "a", "--where", condition) == 0
    kept = [n for n in range(40) if n % 4 == 3 and n % 5 in (0, 1)]
    assert read_all(tmp_path / "a" / "train") == expected(*kept)
    assert run(folder, "--out", tmp_path / "b", "--where", "widht > 3") == 1
    assert "width" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# ---- merging -------------------------------------------------------------------------------------


def write_set(folder: Path, numbers: list[int], **about) -> Path:
    with ShardWriter(folder, max_samples=4, **about) as writer:
        for number in numbers:
            writer.write(*sample(number))
    return folder


def test_merging_joins_licences_and_keeps_classes(tmp_path):
    a = write_set(tmp_path / "a", [0, 1], licence="CC0\nby Ann", classes=["x", "y"], command="mk a")
    b = write_set(tmp_path / "b", [2, 3], licence="CC0\nby Bob")
    assert run(a, b, "--out", tmp_path / "out") == 0
    assert read_all(tmp_path / "out" / "train") == expected(0, 1, 2, 3)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.licence == "CC0\nby Ann\nby Bob" and manifest.classes == ["x", "y"]
    assert [one["shards"] for one in manifest.details["inputs"]] == [str(a), str(b)]
    assert manifest.details["inputs"][0]["commands"] == ["mk a"]
    assert run(a, b, "--out", tmp_path / "other", "--licence", "mine") == 0
    assert Manifest.load(tmp_path / "other" / "train").licence == "mine"


def test_classes_that_clash_are_named(tmp_path, capsys):
    a = write_set(tmp_path / "a", [0], classes=["cat", "dog"])
    b = write_set(tmp_path / "b", [1], classes=["cat", "fox"])
    assert run(a, b, "--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"label 1 is 'dog' in {a} and 'fox' in {b}" in message
    (tmp_path / "classes.txt").write_text("cat\ndog or fox\n")
    assert run(a, b, "--out", tmp_path / "out", "--classes", tmp_path / "classes.txt") == 0
    assert Manifest.load(tmp_path / "out" / "train").classes == ["cat", "dog or fox"]


def test_keys_that_clash_are_named_told_apart_or_dropped(tmp_path, capsys):
    a = write_set(tmp_path / "a", [0, 1, 2, 3, 4])
    b = write_set(tmp_path / "b", [3, 4, 5])
    assert run(a, b, "--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "2 keys stand for several samples" in message
    assert f"'000003' in {a} and {b} (2 times)" in message
    assert run(a, b, "--out", tmp_path / "prefix", "--on-clash", "prefix") == 0
    found = read_all(tmp_path / "prefix" / "train")
    assert set(found) == {
        "000000",
        "000001",
        "000002",
        "000005",
        "0/000003",
        "0/000004",
        "1/000003",
        "1/000004",
    }
    assert found["1/000003"] == sample(3)[1]
    assert run(a, b, "--out", tmp_path / "first", "--on-clash", "first") == 0
    assert read_all(tmp_path / "first" / "train") == expected(*range(6))
    assert Manifest.load(tmp_path / "first" / "train").details["clashing_keys"] == 2
    assert run(a, a, "--out", tmp_path / "twice") == 1  # the same shards: refused as everywhere


def test_damaged_samples_are_an_error_or_left_out(tmp_path, folder, capsys):
    path = folder / "train-000001.tar"
    _, offset, *_ = ShardSet.open(folder).index(1).members(2)[0]
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    assert run(folder, "--out", tmp_path / "a") == 1
    assert "sample '000017' (row 17)" in capsys.readouterr().err
    assert run(folder, "--out", tmp_path / "a", "--on-damage", "skip") == 0
    assert set(expected(*range(40))) - set(read_all(tmp_path / "a" / "train")) == {"000017"}


# ---- statistics and timing -----------------------------------------------------------------------


def test_statistics_are_those_of_the_samples(tmp_path, folder, capsys):
    path = tmp_path / "figures.json"
    assert main(["stats", str(folder), "--by-shard", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "40 samples in 3 shards" in out and "train-000002.tar" in out
    figures = json.loads(path.read_text())
    records = [json.loads(sample(n)[1]["json"]) for n in range(40)]
    widths = [record["width"] for record in records]
    width = figures["columns"]["width"]
    assert (width["samples"], width["min"], width["max"]) == (40, min(widths), max(widths))
    assert width["median"] == np.median(widths) and width["mean"] == np.mean(widths)
    assert figures["columns"]["captions.count"]["mean"] == 1.5
    jpegs = [len(sample(n)[1]["jpg"]) for n in range(40)]
    assert figures["members"]["jpg"]["bytes"] == sum(jpegs)
    assert figures["members"]["jpg"]["max"] == max(jpegs)
    assert figures["labels"] == {str(label): 8 for label in range(5)}
    assert figures["unlabelled"] == 0 and figures["samples"] == 40
    assert figures["bytes"] == sum(os.path.getsize(p) for p in folder.glob("*.tar"))
    assert [shard["samples"] for shard in figures["shards"]] == [15, 15, 10]
    assert figures["shards"][0]["columns"]["width"] == np.median(widths[:15])


def test_statistics_of_a_set_without_labels_name_classes_where_they_can(tmp_path):
    from tools.shards.stats import shard_statistics

    with ShardWriter(tmp_path / "a", classes=["cat", "dog"]) as writer:
        writer.write("0", {"cls": b"1"})
        writer.write("1", {"txt": b"none"})
        writer.write("2", {"cls": b"7"})
    figures = shard_statistics(ShardSet.open(tmp_path / "a"))
    assert figures["labels"] == {"dog": 1, "7": 1} and figures["unlabelled"] == 1
    with ShardWriter(tmp_path / "b") as writer:
        for key, label in enumerate((1000000, 1000001, 1000001)):  # alike in six digits
            writer.write(str(key), {"cls": str(label).encode()})
    figures = shard_statistics(ShardSet.open(tmp_path / "b"))
    assert figures["labels"] == {"1000000": 1, "1000001": 2}


def test_bench_times_what_there_is(tmp_path, scenes, capsys):
    options = ["--samples", "20", "--size", "32", "--workers", "0", "--json"]
    assert main(["bench", str(scenes / "train"), *options, str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert [row["case"] for row in result["rows"]] == [
        "read",
        "read, decode",
        "read, decode, crop, resize",
        "loader, in this process",
    ]
    assert all(row["samples/s"] > 0 and row["MB/s"] > 0 for row in result["rows"])
    with ShardWriter(tmp_path / "texts") as writer:
        writer.write("0", {"txt": b"no image"})
    assert main(["bench", str(tmp_path / "texts"), *options, str(tmp_path / "t.json")]) == 0
    result = json.loads((tmp_path / "t.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["read"]
    assert "only reading was timed" in result["notes"][2] and len(result["notes"]) == 3
    assert main(["bench", str(tmp_path / "texts"), "--repeats", "2"]) == 1
    assert "at least 5" in capsys.readouterr().err
