"""Copies of checkpoints elsewhere: whole or not there, tried again, kept as the run keeps its own,
and brought back."""

import hashlib
import json
import logging
import time
from types import SimpleNamespace

import fsspec
import pytest

from pretrain.engine.checkpoint.copies import Copies
from pretrain.engine.checkpoint.copy import FarCheckpoints
from pretrain.engine.checkpoint.files import (
    CheckpointError,
    checkpoint_name,
    file_entry,
    read_manifest,
    seal_manifest,
    verify_file,
)
from pretrain.engine.checkpoint.settings import CheckpointSettings
from tools.fetch_checkpoint import main

OWNED = SimpleNamespace(lost=False, holds=lambda: True)


def write_checkpoint(root, step: int, content: bytes = b"weights"):
    folder = root / checkpoint_name(step)
    files = {
        "rank_00000.safetensors": content * 999,
        "recipe.yaml": b"name: x\n",
        "tokenizer/tokenizer.json": b"{}",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest = {"format": 1, "step": step, "files": {n: file_entry(folder / n) for n in files}}
    (folder / "manifest.json").write_bytes(seal_manifest(manifest))
    return folder


def whole(folder) -> bool:
    entries = read_manifest(folder)["files"].items()
    return not any(verify_file(folder, name, entry) for name, entry in entries)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        return (tmp_path / "far/run").as_uri()
    memory = fsspec.filesystem("memory")
    if memory.exists("/far"):
        memory.rm("/far", recursive=True)
    return "memory://far/run"


def test_there_and_back(tmp_path, url, capsys):
    far, root = FarCheckpoints(url), tmp_path / "run/checkpoints"
    for step in (4, 8):
        far.copy(write_checkpoint(root, step), "me")
    far.copy(root / checkpoint_name(4), "me")  # again, behind a newer one
    assert far.steps() == [8, 4] and far.newest() == 8
    assert main([url, str(tmp_path / "back")]) == 0
    assert "--resume" in capsys.readouterr().out
    back = tmp_path / "back/checkpoints/step_000000008"
    assert whole(back) and (tmp_path / "back/checkpoints/latest").read_text() == back.name + "\n"
    assert (tmp_path / "back/recipe.yaml").read_text() == "name: x\n"
    assert (tmp_path / "back/tokenizer/tokenizer.json").is_file()
    assert main([url, str(tmp_path / "back")]) == 1 and "there already" in capsys.readouterr().err
    assert main([url, str(tmp_path / "back"), "--step", "6"]) == 1
    assert "there are 4, 8" in capsys.readouterr().err
    assert main([url, str(tmp_path / "back"), "--step", "4"]) == 0
    with pytest.raises(CheckpointError, match="copies of another run"):
        far.copy(root / checkpoint_name(8), "another")


def test_damage_on_either_side_is_found(tmp_path, url, monkeypatch):
    far, root = FarCheckpoints(url), tmp_path / "run/checkpoints"
    folder = write_checkpoint(root, 4)
    opened = far.fs.open

    def rotten(path, mode="rb", **more):
        """A store that keeps other bytes than it was given."""
        if mode == "rb" and "rank_" in path:
            with opened(path, "wb") as file:
                file.write(b"WEIGHTS" * 999)
        return opened(path, mode, **more)

    monkeypatch.setattr(far.fs, "open", rotten, raising=False)
    with pytest.raises(CheckpointError, match="has arrived damaged"):
        far.copy(folder, "me")
    assert far.newest() is None
    with pytest.raises(CheckpointError, match="no whole copy of step 4"):
        far.fetch(4, tmp_path / "back")
    monkeypatch.undo()
    far.copy(folder, "me")
    with far.fs.open(f"{far.root}/{folder.name}/rank_00000.safetensors", "wb") as file:
        file.write(b"WEIGHTS" * 999)
    with pytest.raises(CheckpointError, match="is damaged"):
        far.fetch(4, tmp_path / "back")
    assert not list((tmp_path / "back/checkpoints").iterdir())
    (folder / "rank_00000.safetensors").write_bytes(b"rotten")
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        far.copy(folder, "me")


def test_what_a_store_says_of_the_bytes_spares_reading_them(tmp_path, monkeypatch):
    far = FarCheckpoints((tmp_path / "far").as_uri())
    folder = write_checkpoint(tmp_path, 4)
    info, read = far.fs.info, []
    opened = far.fs.open

    def tagged(path):
        with open(path, "rb") as file:
            return info(path) | {"ETag": f'"{hashlib.md5(file.read()).hexdigest()}"'}

    def noting(path, mode="rb", **more):
        if mode == "rb" and "/step_" in path and not path.endswith("manifest.json"):
            read.append(path)
        return opened(path, mode, **more)

    monkeypatch.setattr(far, "_info", tagged)
    monkeypatch.setattr(far.fs, "open", noting, raising=False)
    far.copy(folder, "me")
    assert not read
    monkeypatch.setattr(far, "_info", lambda path: info(path) | {"ETag": '"' + "0" * 32 + '"'})
    far.copy(write_checkpoint(tmp_path, 8), "me")  # a tag of another kind: read back
    assert len(read) == 3


def test_retention(tmp_path, url):
    far, root = FarCheckpoints(url), tmp_path / "run/checkpoints"
    for step in range(1, 8):
        far.copy(write_checkpoint(root, step), "me")
    far.fs.rm_file(f"{far.root}/step_000000005/manifest.json")
    far.retire(keep_last=2, keep_every_steps=3, newest=6, local=[1, 5])
    assert far.steps() == [7, 6, 4, 3, 1]


def test_a_copy_that_fails_is_tried_again(tmp_path, caplog):
    """By the process that copies; the run only says so."""
    caplog.set_level(logging.INFO, "omnipretrain.copies")
    run, far = tmp_path / "run", tmp_path / "far"
    (run / "control").mkdir(parents=True)
    far.write_text("in the way")
    settings = CheckpointSettings(copy_to=(far / "of_run").as_uri(), copy_wait_minutes=1)
    copies = Copies(run, settings, OWNED, first_wait_s=0.2)
    copies._pause_s = 0.0
    write_checkpoint(run / "checkpoints", 4)
    until = time.monotonic() + 60
    while "again in" not in caplog.text and time.monotonic() < until:
        copies.look()
        time.sleep(0.01)
    said = json.loads((run / "control/copies.json").read_text())
    assert said["step"] is None and said["pending"] == [4] and "NotADirectory" in said["error"]
    copies._child._process.kill()  # as the system may, when memory is short
    far.unlink()
    write_checkpoint(run / "checkpoints", 8)
    copies.finish()
    said = json.loads((run / "control/copies.json").read_text())
    assert (said["step"], said["pending"], said["error"]) == (8, [], "")
    assert whole(far / "of_run/step_000000008") and whole(far / "of_run/step_000000004")
    assert (far / "of_run/latest").read_text() == "step_000000008\n"


def test_a_stop_waits_no_longer_than_it_says(tmp_path, caplog):
    (tmp_path / "run/control").mkdir(parents=True)
    (tmp_path / "far").write_text("in the way")
    settings = CheckpointSettings(copy_to=(tmp_path / "far/x").as_uri(), copy_wait_minutes=0.005)
    write_checkpoint(tmp_path / "run/checkpoints", 4)
    begun = time.monotonic()
    Copies(tmp_path / "run", settings, OWNED).finish()
    assert time.monotonic() - begun < 20 and "the next start goes on with it" in caplog.text


@pytest.mark.parametrize("url, said", [("/a/folder", "file:///"), ("memory://x", "is gone with")])
def test_urls_that_keep_nothing_are_refused(url, said):
    with pytest.raises(ValueError, match=said):
        CheckpointSettings(copy_to=url)
