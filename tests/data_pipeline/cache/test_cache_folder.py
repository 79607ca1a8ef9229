"""The folder of a node's cache: its cap, its account, and what a crash leaves behind."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.cache.cache_folder import CacheError, CacheFolder
from data_pipeline.files import exclusive

fork = multiprocessing.get_context("fork")


def put(folder: CacheFolder, name: str, data: bytes) -> bool:
    reservation = folder.reserve(name, len(data))
    if reservation is None:
        return False
    folder.fill(reservation, [data[:3], data[3:]])
    return True


def bytes_on_disk(folder: Path) -> int:
    """Of blocks, whole or being written, at a moment when none comes or goes."""
    sizes = {}  # by inode: a block that is renamed meanwhile counts once
    with exclusive(folder / "usage"):
        for path in folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                sizes[state.st_ino] = state.st_size
    return sum(sizes.values())


def other_files(folder: Path) -> list[str]:
    """Locks and temporaries."""
    return [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".lock", ".reader"))]


@pytest.fixture
def folder(tmp_path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", 1000)


def test_blocks_come_and_go(folder):
    assert folder.scan() == {} and folder.used() == 0
    assert put(folder, "aa1", b"x" * 400) and put(folder, "ab2", b"0123456789" * 50)
    assert folder.has("aa1") and not folder.has("aa2")
    assert folder.read("ab2", 500, 12, 17) == b"23456"
    assert folder.read("aa2", 500, 0, 5) is None
    assert folder.used() == 900 == bytes_on_disk(folder.folder)
    assert not put(folder, "ac3", b"x" * 101)
    assert put(folder, "ac3", b"x" * 100)
    assert folder.remove("aa1") and not folder.remove("aa1")
    assert folder.used() == 600
    assert {name: size for name, (size, _) in folder.scan().items()} == {"ab2": 500, "ac3": 100}
    assert not other_files(folder.folder)


def test_a_block_of_another_size_is_not_given_out(folder):
    put(folder, "aa1", b"x" * 400)
    os.truncate(folder.path("aa1"), 399)
    assert folder.read("aa1", 400, 0, 10) is None
    assert not folder.has("aa1")


def test_a_failed_download_leaves_nothing(folder):
    def breaks():
        yield b"abc"
        raise ConnectionError("gone")

    reservation = folder.reserve("aa1", 10)
    assert folder.used() == 10
    with pytest.raises(ConnectionError):
        folder.fill(reservation, breaks())
    with pytest.raises(CacheError, match="3 bytes came for a block of 10"):
        folder.fill(folder.reserve("aa1", 10), [b"abc"])
    folder.release(folder.reserve("aa1", 10))
    assert folder.used() == 0 == bytes_on_disk(folder.folder)
    assert not folder.has("aa1") and not other_files(folder.folder)


def test_the_account_is_found_again(folder):
    put(folder, "aa1", b"x" * 400)
    for damage in (lambda f: f.unlink(), lambda f: f.write_bytes(b"12")):
        damage(folder.folder / "usage")
        assert folder.used() == 400
    folder.path("aa1").unlink()  # by somebody else
    assert folder.used() == 400
    folder.scan()
    assert folder.used() == 0


def test_the_cap_holds_at_every_moment(folder):
    """Four processes fill and evict as fast as they can; another one adds up what is on disk."""
    folder.scan()

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(250):
            name = f"{rng.randrange(8):02x}-{rng.randrange(3)}"
            if rng.random() < 0.4:
                folder.remove(name)
                continue
            with folder.fetching(name):
                if not folder.has(name):
                    put(folder, name, b"x" * rng.randrange(1, 300))

    processes = [fork.Process(target=hammer, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, bytes_on_disk(folder.folder))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert 300 < most <= 1000
    used = folder.used()
    assert used == bytes_on_disk(folder.folder)
    folder.scan()
    assert folder.used() == used
    assert not other_files(folder.folder)


def killed_while(action, *arguments) -> None:
    """Kill a process as soon as it says that it is at it."""
    ours, theirs = fork.Pipe()
    process = fork.Process(target=action, args=(*arguments, theirs))
    process.start()
    assert ours.recv() == "at it"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _download_forever(folder: CacheFolder, name: str, connection) -> None:
    def chunks():
        yield b"abc"
        connection.send("at it")
        time.sleep(60)

    with folder.reading_ahead(), folder.fetching(name):
        folder.fill(folder.reserve(name, 600), chunks())


def test_a_killed_owner_blocks_nobody(folder):
    killed_while(_download_forever, folder, "aa1")
    assert other_files(folder.folder)
    assert folder.used() == 600
    with folder.fetching("aa1"):  # at once
        assert not folder.has("aa1")
        assert not put(folder, "aa1", b"x" * 600)  # its space is not yet known to be free
    folder.scan()
    assert folder.used() == 0 and folder.readers() == 0
    assert not other_files(folder.folder)
    with folder.fetching("aa1"):
        assert put(folder, "aa1", b"x" * 600)


def test_a_scan_leaves_the_living_alone(folder):
    reservation = folder.reserve("aa1", 600)
    with folder.reading_ahead(), folder.fetching("aa1"):
        found = fork.Queue()
        fork.Process(target=lambda: found.put((folder.scan(), folder.readers()))).start()
        assert found.get(timeout=30) == ({}, 1)
        folder.fill(reservation, [b"x" * 600])
    assert folder.readers() == 0
    assert folder.read("aa1", 600, 0, 3) == b"xxx"
    assert folder.used() == 600


def test_only_one_downloads(folder):
    """Threads of several processes want the same block."""
    downloads = fork.Value("i", 0)

    def want() -> None:
        with folder.fetching("aa1"):
            if not folder.has("aa1"):
                with downloads.get_lock():
                    downloads.value += 1
                time.sleep(0.05)
                put(folder, "aa1", b"x" * 10)

    def several() -> None:
        threads = [threading.Thread(target=want) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    processes = [fork.Process(target=several) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert downloads.value == 1


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    """What lies in a cache may be removed, so nothing else may lie there."""
    words, note = tmp_path / "en" / "english.txt", tmp_path / "en" / "note.tmp"
    words.parent.mkdir()
    words.write_bytes(b"x" * 50)
    note.write_bytes(b"")
    folder = CacheFolder(tmp_path, 1000)
    for action in (
        folder.scan,
        folder.used,
        lambda: folder.reserve("aa1", 10),
        lambda: folder.reading_ahead().__enter__(),
        lambda: folder.remove("english.txt"),
    ):
        with pytest.raises(CacheError, match=r"holds 'en', which is not of a cache; name an empty"):
            action()
    assert words.stat().st_size == 50 and note.exists()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [words, note]


def test_files_that_are_laid_into_a_cache_stay(folder):
    put(folder, "aa1", b"x" * 400)
    other = folder.path("aa1").with_name("thesis.tmp")
    other.write_bytes(b"")
    assert list(folder.scan()) == ["aa1"] and folder.used() == 400
    assert other.exists()


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    folder = CacheFolder(tmp_path / "file" / "cache", 1000)
    for action in (
        folder.scan,
        folder.used,
        lambda: folder.reserve("aa1", 10),
        lambda: folder.fetching("aa1").__enter__(),
        lambda: folder.reading_ahead().__enter__(),
        lambda: folder.read("aa1", 10, 0, 10),
        lambda: folder.remove("aa1"),
    ):
        with pytest.raises(CacheError, match=r"cache .*file/cache: Not a directory"):
            action()

    usable = CacheFolder(tmp_path / "of another user", 1000)
    put(usable, "aa1", b"x" * 10)

    def refused(path, flags, *mode, open=os.open):
        if flags & (os.O_WRONLY | os.O_RDWR):  # whoever runs this test: root may do everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        for action in (
            lambda: usable.reserve("aa2", 10),
            usable.scan,
            lambda: usable.remove("aa1"),
            lambda: usable.reading_ahead().__enter__(),
        ):
            with pytest.raises(CacheError, match=r"user/.*\. Users .*umask 002.*of your own$"):
                action()
        assert usable.read("aa1", 10, 0, 10) == b"x" * 10  # what is there is used all the same

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = CacheFolder(tmp_path / "cache", 1000)
    reservation = folder.reserve("aa1", 10)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CacheError, match=r"the disk is full; lower loader.cache.max_gib"):
        folder.fill(reservation, [b"x" * 10])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheError, match="the disk is full"):
        folder.reserve("aa1", 10)
    assert bytes_on_disk(folder.folder) == 0 == folder.used()
    assert not other_files(folder.folder)
