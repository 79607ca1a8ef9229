"""The tokenizer tool: the same captions give the same bytes, in any process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.shards.packer import ShardWriter
from tests.data_pipeline.photos import caption, damage, pack
from tools.train_tokenizer import main

FILES = ("tokenizer.json", "tokenizer_config.json")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def saved(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_equal_bytes_in_any_process(tmp_path):
    """Neither hash seeds nor the number of threads of the library show."""
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(caption(number) for number in range(3000)), encoding="utf-8")
    for threads in ("1", "5"):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "tools.train_tokenizer",
                tmp_path / threads,
                "--text",
                lines,
                "--vocab-size",
                "500",
            ],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads},
            check=True,
        )
    assert saved(tmp_path / "1") == saved(tmp_path / "5")


def test_captions_of_shards(tmp_path, capsys):
    pack(tmp_path / "set", 60)
    damage(tmp_path / "set", [4])  # the picture: captions do not need it
    arguments = ["--shards", tmp_path / "set", "--vocab-size", 300]
    assert run(tmp_path / "txt", *arguments) == 0
    (tmp_path / "captions.txt").write_text("\n".join(caption(number) for number in range(60)))
    assert run(tmp_path / "same", "--text", tmp_path / "captions.txt", "--vocab-size", 300) == 0
    assert saved(tmp_path / "txt") == saved(tmp_path / "same")
    assert Tokenizer.load(tmp_path / "txt").digest[:16] in capsys.readouterr().err
    assert run(tmp_path / "json", *arguments, "--caption-source", "json:captions") == 0
    assert "left out 15 of 60 samples; first: " in capsys.readouterr().err.replace("\n", " ")
    assert saved(tmp_path / "json") != saved(tmp_path / "txt")


def test_captions_of_several_sources(tmp_path, capsys):
    pack(tmp_path / "set", 40)
    lines = [caption(n + 1000 * i) for n in range(40) for i in range(n % 4)]
    lines += [caption(number) for number in range(40)]
    (tmp_path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    both = ["--shards", tmp_path / "set", "--caption-source", "json:captions", "txt"]
    assert run(tmp_path / "both", *both, "--vocab-size", 300) == 0
    assert run(tmp_path / "same", "--text", tmp_path / "captions.txt", "--vocab-size", 300) == 0
    assert saved(tmp_path / "both") == saved(tmp_path / "same")
    assert "left out" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--shards", "x", "--caption-source", "json:")
    assert "write an extension, or json:KEY" in capsys.readouterr().err


def test_captions_of_samples_that_meet_a_condition(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    pack(tmp_path / "set", 60)
    lines = [caption(number) for number in range(20, 60, 2)]
    (tmp_path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    where = ["--shards", tmp_path / "set", "--max-samples", 20, "--vocab-size", 300, "--where"]
    assert run(tmp_path / "kept", *where, "key >= '00020'") == 0
    assert run(tmp_path / "same", "--text", tmp_path / "captions.txt", "--vocab-size", 300) == 0
    assert saved(tmp_path / "kept") == saved(tmp_path / "same")
    assert run(tmp_path / "none", *where, "key > 'x'") == 1
    assert "none of the 60 samples meets it" in capsys.readouterr().err


def test_without_a_single_caption(tmp_path, capsys):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("0", {"jpg": b""})
    assert run(tmp_path / "out", "--shards", tmp_path / "set") == 1
    assert "has no member txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "No such file"),
        (b"\xff\xfe\xfa", [], "captions.txt, line 1: it is UTF-16, not UTF-8"),
        (b"\n \n", [], "no captions"),
        (b"a cat\n", ["--vocab-size", "100"], "need 259"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, content, options, message):
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(tmp_path / "out", "--text", path, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "captions.txt" in error or "259" in error
    assert not (tmp_path / "out").exists()
