"""All processes of a node together stay below the limits of a host, and dead ones hold nothing."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time

import pytest

from data_pipeline.storage import limits
from data_pipeline.storage.limits import HostLimits, node_folder
from data_pipeline.storage.remote import RemoteSettings, UrlStorage
from tests.data_pipeline.small_shards import write_shards
from tests.data_pipeline.storage.faulty_server import CountingServer, FaultyServer

PIECE = 1 << 18  # bytes that arrive before they are paid for, for each request at a time


@pytest.fixture(autouse=True)
def a_node_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def in_processes(count, target, *arguments):
    """Run `target` in so many forked processes; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def read_in_threads(url, settings):
    storage = UrlStorage(settings)

    def read():
        for number in range(5):
            assert len(storage.read(url, number, number + 1000)) == 1000

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_processes_of_a_node_share_the_requests_of_a_host(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(5000))
    with CountingServer(tmp_path) as server:
        arguments = f"{server.url}/x.tar", RemoteSettings(requests_per_host=3)
        assert in_processes(4, read_in_threads, *arguments) == [0] * 4
        assert server.most == 3 and len(server.asked) == 4 * 4 * 5
        # One at a time beside others that may have three: the least of all still gets through.
        hard, soft = RemoteSettings(requests_per_host=1), RemoteSettings(requests_per_host=3)
        with contextlib.ExitStack() as stack:
            place = HostLimits(3, folder=node_folder())
            for _ in range(2):
                stack.enter_context(place.request(server.url.removeprefix("http://")))
            server.most = 0
            # Places 0 and 1 are taken, so that only those who may take place 2 go on.
            assert in_processes(2, read_in_threads, arguments[0], soft) == [0, 0]
            assert server.most == 1
            context = multiprocessing.get_context("fork")
            waits = context.Process(target=read_in_threads, args=(arguments[0], hard))
            waits.start()
            waits.join(0.3)
            assert waits.is_alive()
        waits.join()
        assert waits.exitcode == 0


def test_hosts_do_not_wait_for_each_other_and_a_user_cannot_be_led_elsewhere(tmp_path, caplog):
    folder = node_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent == tmp_path
    one = HostLimits(1, folder=folder)
    with one.request("a:1"), one.request("a:2"), one.request("b/../../c"):
        assert len(list(folder.iterdir())) == 3
    shutil.rmtree(folder)  # by somebody who tidies up
    with one.request("a:1"):
        assert len(list(folder.iterdir())) == 1
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    write_shards(tmp_path / "set", 4, 2)
    assert not caplog.text  # which is nobody's business where all shards lie here
    with FaultyServer(tmp_path / "set") as server:
        url = server.url + "/manifest.json"
        assert UrlStorage(RemoteSettings(requests_per_host=1)).read(url, 0, 1) == b"{"
    assert "is not a folder of this user" in caplog.text
    assert not list((tmp_path / "elsewhere").iterdir())
    folder.unlink()
    folder.write_text("a file")
    # A folder that cannot be written into: each process keeps to the limit by itself.
    unwritable = HostLimits(2, folder=folder)
    with unwritable.request("a"), unwritable.request("a"):
        assert "limits of requests hold for each process by itself" in caplog.text


def test_a_disk_that_fails_is_no_fault_of_the_host(tmp_path, monkeypatch, caplog):
    """A missing folder of temporary files, above all, is not a missing file of the host."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of the job"))
    (tmp_path / "of the job").mkdir()
    places = HostLimits(1, 1e9, node_folder())
    with places.request("a"), places.request("b"):
        pass
    shutil.rmtree(tmp_path / "of the job")  # the scheduler thinks that the job has ended
    with places.request("a"):
        got = threading.Event()

        def take():
            with places.request("a"):
                got.set()

        thread = threading.Thread(target=take)
        thread.start()
        places.received("a", 1)
        places.received("b", 1)
        assert not got.wait(0.1)  # the limit holds in this process
    thread.join()
    assert got.is_set()
    assert caplog.text.count("limits of requests hold for each process by itself") == 2

    (tmp_path / "of the job").mkdir()
    full = HostLimits(1, 1e9, node_folder())
    full.received("a", 1)

    def pwrite(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", pwrite)
    full.received("a", 1)
    assert "no space" in caplog.text


def test_nodes_that_share_a_folder_have_limits_of_their_own(monkeypatch):
    with HostLimits(1, folder=node_folder()).request("host"):
        monkeypatch.setattr(limits, "_boot", lambda: b"another.")
        thread = threading.Thread(
            target=lambda: HostLimits(1, folder=node_folder()).request("host").__enter__(),
            daemon=True,
        )
        thread.start()
        thread.join(60)
        assert not thread.is_alive()


def hold(folder, ready):
    with contextlib.ExitStack() as stack:
        places = HostLimits(2, folder=folder)
        stack.enter_context(places.request("host"))
        stack.enter_context(places.request("host"))
        ready.set()
        time.sleep(600)


def wait_in_line(folder, ready):
    ready.set()
    with HostLimits(2, folder=folder).request("host"):
        os._exit(1)


def test_places_and_turns_of_the_dead_are_free(caplog, monkeypatch):
    monkeypatch.setattr(limits, "_SAY_S", 0.05)
    folder = node_folder()
    context = multiprocessing.get_context("fork")
    processes = []
    for target in (hold, wait_in_line):
        ready = context.Event()
        processes.append(context.Process(target=target, args=(folder, ready)))
        processes[-1].start()
        assert ready.wait(60)
    owner, waiting = processes
    time.sleep(0.2)
    assert waiting.is_alive()  # it has the turn, and no place
    got = threading.Event()

    def take():
        with HostLimits(2, folder=folder).request("host"):
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    os.kill(waiting.pid, signal.SIGKILL)
    waiting.join()
    while "host: processes of this node have used all 2 requests at a time" not in caplog.text:
        time.sleep(0.01)
    assert not got.is_set()
    os.kill(owner.pid, signal.SIGKILL)
    assert got.wait(60)
    thread.join()
    owner.join()
    assert (owner.exitcode, waiting.exitcode) == (-9, -9)


def test_a_place_is_given_back_though_a_child_has_its_file():
    folder = node_folder()
    places = HostLimits(1, folder=folder)
    with places.request("host"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    got = threading.Event()

    def take():
        with places.request("host"):
            got.set()

    threading.Thread(target=take, daemon=True).start()
    try:
        assert got.wait(30)
    finally:
        child.kill()
        child.join()


def take_in(folder, rate, pieces, queue):
    places = HostLimits(4, rate, folder)
    for _ in range(pieces):
        places.received("host", PIECE)
        queue.put(time.monotonic())


def test_bytes_per_second_of_a_node():
    """However fast processes are, in no stretch of time more arrives than the limit allows."""
    processes, pieces, rate = 3, 8, 16 * PIECE
    queue = multiprocessing.get_context("fork").SimpleQueue()
    started = time.monotonic()
    arguments = node_folder(), rate, pieces, queue
    assert in_processes(processes, take_in, *arguments) == [0] * processes
    paid = sorted(queue.get() for _ in range(processes * pieces))
    for first in range(len(paid)):
        for last in range(first + 1, len(paid)):
            # Moments are noted behind the wait, by processes that may have been held up.
            assert (last - first - processes) * PIECE <= rate * (paid[last] - paid[first])
    assert paid[-1] - started >= processes * pieces * PIECE / rate


def test_what_was_booked_before_the_last_boot_is_forgotten(monkeypatch):
    places = HostLimits(1, 1000.0, node_folder())
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    places.received("host", 10_000_000)
    places.received("host", 1000)
    # Deadlines are differences of large clock readings: exact to far less than a millisecond.
    assert 9_990 < waits[0] < 10_000.001
    assert waits[0] < waits[1] < 10_001.001
    monkeypatch.setattr(limits, "_boot", lambda: b"another.")
    places.received("host", 1000)
    assert 0.5 < waits[2] < 1.001
    (file,) = node_folder().iterdir()
    file.write_bytes(b"rubbish")
    places.received("host", 2000)
    assert 1.5 < waits[3] < 2.001
