import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline.files import (
    exclusive,
    give_usual_access,
    leftovers,
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
