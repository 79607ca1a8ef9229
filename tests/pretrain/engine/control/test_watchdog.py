"""The watchdog ends a phase without progress, with stacks, and names the right ranks."""

import os
import threading
import time

import pytest
import torch.distributed as dist

from pretrain.engine.control.watchdog import Limits, Watchdog

QUICK = Limits(start=0.6, step=0.3, save=1.2)


class Ended:
    """Stands in for the end of the process: what was noted, and when."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.codes: list[int] = []
        self.event = threading.Event()

    def end(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


@pytest.fixture
def start(tmp_path):
    """Starts watchdogs of ranks; gives (watchdog, how it ended)."""
    started = []

    def begin(rank: int = 0, world: int = 1, limits: Limits = QUICK, **more):
        ended = Ended()

        def expired(reason: str) -> int:
            ended.reasons.append(reason)
            return 1

        dog = Watchdog(tmp_path, rank, world, limits, expired, end=ended.end, **more)
        started.append(dog)
        return dog, ended

    yield begin
    for dog in started:
        dog.stop()


def test_progress_keeps_a_run_alive_and_a_hang_ends_it(start, tmp_path):
    alive = []
    dog, ended = start(alive=lambda: alive.append(1))
    for step in range(8):
        dog.enter("step", step)
        time.sleep(0.1)
    with dog.during("save"):
        time.sleep(0.7)  # longer than a step may take
    assert not ended.codes and alive
    assert ended.event.wait(5) and ended.codes == [1]
    (reason,) = ended.reasons
    assert "in step 7; it is alone; stacks of rank 0: logs/stacks_rank_00000.txt" in reason
    stacks = (tmp_path / "logs/stacks_rank_00000.txt").read_text()
    assert "test_progress_keeps_a_run_alive" in stacks  # the main thread's, not only its own


def test_nothing_is_left_of_a_run_that_ended_well(start, tmp_path):
    dog, ended = start()
    dog.stop()
    time.sleep(0.8)
    assert not ended.codes and not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("before", [True, False])
def test_the_rank_that_stopped_is_named(start, before):
    """Rank 2 never came, or reported until it was stopped; rank 1 waits as rank 0 does."""
    store = dist.HashStore()
    dogs = [start(rank, 3, store=lambda: store)[0] for rank in (1, 2) if rank == 1 or before]
    dog, ended = start(0, 3, store=lambda: store)
    for one in (dog, *dogs):
        one.enter("step", 4)
    time.sleep(0.2)
    for one in dogs[1:]:
        one.stop()
    assert ended.event.wait(10)
    (reason,) = ended.reasons
    named = "does not report any more" if before else "has never reported"
    assert f"rank 2 {named}" in reason and "rank 1" not in reason


def test_who_is_elsewhere_is_named(start):
    store = dist.HashStore()
    dog, ended = start(0, 2, store=lambda: store)
    other, _ = start(1, 2, store=lambda: store)
    dog.enter("step", 8)
    deadline = time.monotonic() + 10
    while not ended.codes and time.monotonic() < deadline:
        other.enter("evaluate", 7)
        time.sleep(0.05)
    assert "rank 1 is in evaluate of step 7" in ended.reasons[0]


def test_a_store_that_is_gone_points_at_rank_0(start):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    _, ended = start(1, 2, store=lambda: client)
    time.sleep(0.2)
    del server
    assert ended.event.wait(15)
    assert "rank 0 or its node hangs or is gone" in ended.reasons[0]


def test_a_process_whose_threads_cannot_run_is_ended_too(tmp_path, monkeypatch):
    """Something in C keeps the interpreter's lock: no Python thread ever runs again."""
    monkeypatch.setattr("pretrain.engine.control.watchdog._LAST_RESORT_S", 0.2)
    pid = os.fork()
    if not pid:
        import ctypes

        Watchdog(tmp_path, 3, 4, QUICK, lambda reason: 1)
        ctypes.PyDLL(None).sleep(60)  # PyDLL does not release the lock
        os._exit(0)
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(done[1]) == 1
    assert "Timeout" in (tmp_path / "logs/stacks_rank_00003.txt").read_text()


def test_who_is_to_leave_and_does_not_is_ended(start, monkeypatch):
    """A checkpoint that is being written is let finish."""
    monkeypatch.setattr("pretrain.engine.control.watchdog.GRACE_S", 0.3)
    dog, ended = start(limits=Limits(9, 1.2, 9), alive=lambda: "torchrun is gone")
    with dog.during("save"):
        time.sleep(1.2)
        assert not ended.codes
    assert ended.event.wait(5)
    assert ended.reasons[0].startswith("torchrun is gone; it could not stop by itself")
