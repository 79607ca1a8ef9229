"""`tools.shards` finds all damage, shows what is there, and says so by its exit code."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data_pipeline.shards.index_file import load_index
from data_pipeline.shards.packer import ShardWriter
from tests.data_pipeline.small_shards import sample, write_shards
from tools.shards.__main__ import main
from tools.support.range_server import RangeServer


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
    index = load_index(folder / "train-000001.tar.idx")
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
    index = load_index(folder / "train-000002.tar.idx")
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
        assert "holds neither a manifest.json nor a *.tar\n" in capsys.readouterr().err


def test_a_folder_of_splits_is_told_from_a_split(folder, capsys):
    assert run("verify", folder.parent) == 1
    assert f"nor a *.tar; packed shards lie in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_texts_are_written_in_utf8_in_any_locale(tmp_path, locale):
    with ShardWriter(tmp_path / "set", max_samples=9) as writer:
        writer.write("0", {"txt": "au caf\u00e9, \u00b11".encode()})
    done = subprocess.run(
        [sys.executable, "-m", "tools.shards", "inspect", str(tmp_path / "set"), "--sample", "0"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "au caf\u00e9, \u00b11" in done.stdout.decode("utf-8")


def test_wrong_usage_has_its_own_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "tools.shards", "verify"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
    )
    assert done.returncode == 2


@pytest.fixture
def url(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with RangeServer(folder) as server:
        yield server.url


def test_remote_shards(folder, url, capsys):
    assert run("inspect", url) == 0
    out = capsys.readouterr().out
    assert "10 samples in 3 shards" in out and f"{url}/manifest.json" in out
    assert run("inspect", url, "--sample", "000003") == 0
    assert f"row 3: 000003 in {url}/train-000000.tar" in capsys.readouterr().out
    assert run("verify", url, "--verbose") == 0
    assert capsys.readouterr().out.count("samples, whole\n") == 3
    index = load_index(folder / "train-000001.tar.idx")
    flip(folder / "train-000001.tar", index.members(2)[0][1])
    assert run("verify", f"{url}/train-00000{{0..2}}.tar?sig=hush") == 1
    out = capsys.readouterr().out
    assert f"{url}/train-000001.tar?...: sample '000006': member .jpg: damaged payload" in out
    assert "3 shards, 10 samples: 1 shards with faults, 1 damaged samples" in out
    assert run("verify", f"{url}/none.tar") == 1
    assert "none.tar: HTTP 404" in capsys.readouterr().out


def test_remote_indices_are_built_and_given_out(folder, url, tmp_path, capsys):
    strong = {path.name: path.read_bytes() for path in folder.glob("*.idx")}
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    specs = f"{url}/train-00000{{0..2}}.tar"
    assert run("index", specs, "--out", tmp_path / "weak") == 0
    assert "3 shards indexed, 10 samples; 0 shards damaged" in capsys.readouterr().out
    weak = load_index(tmp_path / "weak" / "train-000001.tar.idx")
    assert not weak.payloads_hashed
    assert run("inspect", specs) == 0
    assert "damage inside of payloads is not seen" in capsys.readouterr().out
    assert run("index", specs, "--full", "--out", tmp_path / "full") == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "full").iterdir()} == strong
    capsys.readouterr()
    assert run("index", specs, specs, "--out", tmp_path / "twice") == 1
    assert "several shards are named train-000000.tar" in capsys.readouterr().err
    os.truncate(folder / "train-000002.tar", 700)
    assert run("index", specs, "--force") == 1
    assert f"{url}/train-000002.tar: byte 0: member '000008.jpg' needs" in capsys.readouterr().err


def test_serve(folder):
    command = [sys.executable, "-m", "tools.shards", "serve", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split(" at ")[-1].split()[0]
        request = urllib.request.Request(address + "/train-000000.tar")
        request.add_header("Range", "bytes=512-1023")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            content = (folder / "train-000000.tar").read_bytes()
            assert answer.status == 206 and answer.read() == content[512:1024]
        for name in ("/none.tar", "/../" + folder.name + "-other", "/%2e%2e/x"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                opener.open(address + name)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


@pytest.mark.parametrize("options", [["--port", "65536"], ["--fail", "1.5"], ["--delay-ms", "-1"]])
def test_what_cannot_be_served_is_refused(folder, options, capsys):
    assert main(["serve", str(folder), *options]) == 1
    assert options[0] in capsys.readouterr().err
    assert main(["serve", str(folder / "none")]) == 1
    assert "none: is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["bytes=0-3,8-9", "lines=1-2", "bytes=-"])
def test_ranges_that_are_not_served_give_the_whole_file(folder, url, header):
    request = urllib.request.Request(url + "/manifest.json", headers={"Range": header})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        assert answer.status == 200 and "Content-Range" not in answer.headers
        assert answer.read() == (folder / "manifest.json").read_bytes()


def test_bundles(tmp_path, capsys):
    write_shards(tmp_path / "set", 10, 4, bundle=3)
    assert run("inspect", tmp_path / "set") == 0
    assert "its samples lie in bundles" in capsys.readouterr().out
    assert run("inspect", tmp_path / "set", "--sample", "000007") == 0
    assert "row 7: 000007" in capsys.readouterr().out
    flip(tmp_path / "set" / "train-000001.tar", 700)
    assert run("verify", tmp_path / "set", "--processes", 1) == 1
    assert "sample '000004'" in capsys.readouterr().out
    for path in (*(tmp_path / "set").glob("*.idx"), tmp_path / "set" / "manifest.json"):
        path.unlink()
    assert run("index", tmp_path / "set", "--processes", 1) == 1
    assert "train-000001.tar: byte 0: " in capsys.readouterr().err
