import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.index import ShardIndex
from tests.data_pipeline.samples import sample, write_shards
from tools.shards import main


@pytest.fixture
def folder(tmp_path) -> Path:
    write_shards(tmp_path / "set", 10, 4)
    return tmp_path / "set"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_verify_whole_shards(folder, capsys):
    assert run("verify", folder, "--processes", 2, "--verbose") == 0
    out = capsys.readouterr().out
    assert "3 shards, 10 samples: 0 shards with faults, 0 damaged samples" in out
    assert out.count("samples, whole\n") == 3


def test_verify_names_all_damage(folder, capsys):
    index = ShardIndex.load(folder / "train-000001.tar.idx")
    for row in (0, 3):
        flip(folder / "train-000001.tar", index.members(row)[1][1])
    os.truncate(folder / "train-000002.tar", 600)
    assert run("verify", folder, "--processes", 1) == 1
    out = capsys.readouterr().out
    for number in (4, 7, 8, 9):
        assert f"sample '{sample(number)[0]}'" in out
    assert "sample '000005'" not in out
    assert "3 shards, 10 samples: 2 shards with faults, 4 damaged samples" in out


def test_verify_finds_missing_swapped_and_touched_shards(folder, capsys):
    (folder / "train-000000.tar").unlink()
    for suffix in ("", ".idx"):
        os.rename(folder / f"train-000001.tar{suffix}", folder / f"train-000000.tar{suffix}")
    data = bytearray((folder / "train-000002.tar").read_bytes())
    index = ShardIndex.load(folder / "train-000002.tar.idx")
    _, offset, size, _, _ = index.members(0)[0]
    assert data[offset + size] == 0  # padding: no sample is damaged
    data[offset + size] = 1
    (folder / "train-000002.tar").write_bytes(data)
    assert run("verify", folder) == 1
    out = capsys.readouterr().out
    assert "train-000000.tar: its index is not the one of the manifest" in out
    assert "train-000001.tar" in out and "No such file" in out
    assert "train-000002.tar: its sha256 is not that of the manifest" in out


def test_verify_without_index_or_manifest(folder, capsys):
    for path in (*folder.glob("*.idx"), folder / "manifest.json"):
        path.unlink()
    assert run("verify", folder / "*.tar", "--processes", 1) == 0
    flip(folder / "train-000001.tar", 10)
    assert run("verify", folder / "*.tar", "--processes", 1) == 1
    assert "train-000001.tar: byte 0: this is not a tar header" in capsys.readouterr().out
    assert not list(folder.glob("*.idx"))  # verify writes nothing


def test_index(folder, capsys):
    written = {path: path.read_bytes() for path in folder.glob("*.idx")}
    for path in written:
        path.unlink()
    assert run("index", folder, "--processes", 2) == 0
    assert "3 shards indexed, 10 samples; 0 shards damaged" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.glob("*.idx")} == written


def test_index_reports_damage_and_force_replaces(folder, capsys):
    flip(folder / "train-000000.tar.idx", 1000)
    assert run("index", folder, "--processes", 1) == 1
    assert "train-000000.tar.idx: damaged or foreign index" in capsys.readouterr().err
    assert run("index", folder, "--force", "--processes", 1) == 0
    assert run("verify", folder, "--processes", 1) == 0


def test_inspect(folder, capsys):
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "10 samples in 3 shards" in out and "cls x 10, jpg x 10, json x 10" in out
    assert "columns: bytes:cls, bytes:jpg, bytes:json, captions.characters.max" in out
    assert "captions.words.min, cls, score, width\n" in out
    assert "1: 000001 (jpg 397 B" in out


def test_inspect_a_sample_by_key_and_by_row(folder, capsys):
    outputs = []
    for name in ("000006", "6"):
        assert run("inspect", folder, "--sample", name) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("row 6: 000006 in ") and 'captions: ["a", "a"]' in outputs[0]
    assert run("inspect", folder, "--sample", "cat") == 1
    assert "no sample has the key 'cat'" in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    for command in ("index", "verify", "inspect"):
        assert run(command, tmp_path) == 1
        assert "holds neither a manifest.json nor a *.tar" in capsys.readouterr().err


def test_wrong_usage_has_its_own_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "tools.shards", "verify"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
    )
    assert done.returncode == 2
