"""Files are whole or absent, and locks of killed owners are free."""

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import files
from data_pipeline.files import (
    exclusive,
    give_usual_access,
    leftovers,
    naming,
    temporary_name,
    write_atomically,
)
from tests.umask import umask

HOLDER = """
import sys, time
from pathlib import Path
from data_pipeline.files import exclusive, temporary_name
path = Path(sys.argv[1])
with exclusive(path):
    temporary_name(path).write_bytes(b"half")
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, [b"one", b"two"])

    def broken():
        yield b"three"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, broken())
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_usual_access_is_that_of_a_new_file(tmp_path, mask):
    for path, mode in ((tmp_path / "closed", 0o600), (tmp_path / "open", 0o777)):
        path.write_bytes(b"x")
        path.chmod(mode)
        with umask(mask):
            give_usual_access(path)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(os.listdir(tmp_path)) == ["closed", "open"]


def test_the_lock_of_a_killed_owner_is_free(tmp_path):
    path = tmp_path / "x"
    holder = start_holder(path)
    with pytest.raises(BlockingIOError), exclusive(path, wait=False):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "x.lock").exists()  # left behind, and no hindrance
    with exclusive(path, wait=False) as locked:
        assert locked
    (left,) = leftovers(path)
    assert left.read_bytes() == b"half"
    assert not (tmp_path / "x.lock").exists()


def test_temporary_names_never_meet(tmp_path):
    assert temporary_name(tmp_path / "x") != temporary_name(tmp_path / "x")
    assert leftovers(tmp_path / "x") == []


def add_one(path, times):
    for _ in range(times):
        with exclusive(path):
            value = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(value + 1))


def test_one_at_a_time(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_one, args=(path, 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text() == "160"
    assert os.listdir(tmp_path) == ["count"]


def refuse_folder_sync(monkeypatch, number: int) -> None:
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return plain(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_sync_folders_are_used(tmp_path, monkeypatch, caplog, number):
    """CIFS before Linux 4.17 and some FUSE mounts; it is said once."""
    refuse_folder_sync(monkeypatch, number)
    monkeypatch.setattr(files, "_folder_sync_refused", False)
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "x", [content])
    assert (tmp_path / "x").read_bytes() == b"new"
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and os.strerror(number) in record.getMessage()


def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch):
    """Those of writes and syncs do not do so by themselves."""
    refuse_folder_sync(monkeypatch, errno.EIO)
    with pytest.raises(OSError) as failed:
        write_atomically(tmp_path / "x", [b"1"])
    assert failed.value.errno == errno.EIO and failed.value.filename == str(tmp_path)
    full = Path("/dev/full")
    if full.is_char_device():
        with pytest.raises(OSError) as failed, naming(tmp_path / "y"), open(full, "wb") as file:
            file.write(b"1")
            file.flush()
        assert failed.value.errno == errno.ENOSPC
        assert failed.value.filename == str(tmp_path / "y")
        monkeypatch.setattr(files, "temporary_name", lambda path: full)
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: None)
        with pytest.raises(OSError) as failed:  # its close fails once more
            write_atomically(tmp_path / "z", [b"1"])
        assert failed.value.filename == str(tmp_path / "z")
