"""Ends a rank that hangs, with its stacks on file, and says which ranks it waited for.

A collective hangs for minutes before its own time-out, and then names nobody. So a thread of each
rank knows in what phase the run is and since when. It reports that to the store that the ranks met
in, once in a while. When the limit of a phase is over it writes the stacks of all threads to
`logs/stacks_rank_N.txt`, asks the store who is silent, and ends the process; the launcher ends the
others. A process whose threads cannot run any more (something holds the interpreter's lock) is
ended by `faulthandler`, which needs no lock, half a minute later.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

log = logging.getLogger("omnipretrain.watchdog")

REPORT_S = 5.0
"""Seconds between two reports of a rank at most; who reports nothing for two of them is missed."""
STORE_IS_GONE = "the store of rank 0 does not answer: rank 0 or its node hangs or is gone"
GRACE_S = 25.0
_LAST_RESORT_S = 30.0
_NAMED = 8


class Limits(NamedTuple):
    """Seconds that a phase may take without a sign of progress."""

    start: float
    """From the process's start to the first step: rendezvous, model, data, restore."""
    step: float
    """A step, with the wait for its data; a batch of an evaluation."""
    save: float

    def of(self, phase: str) -> float:
        """The limit of a phase."""
        return {"save": self.save, "step": self.step, "evaluate": self.step}.get(phase, self.start)

    @property
    def of_collectives(self) -> timedelta:
        """What process groups and the rendezvous wait: longer than this watchdog, which can say
        more."""
        return timedelta(seconds=max(self) + 60)


class Watchdog:
    """What this rank is doing, watched from a thread of its own.

    Args:
        run_dir: stacks go to its `logs/`.
        rank, world: this process.
        limits: seconds per phase.
        expired: called with the reason before the process ends; returns its exit code.
        alive: called every few seconds from the thread, as long as the phase is within its limit
            (rank 0's heartbeat). What it returns, if anything, is a reason to leave: the process
            has `GRACE_S` to do so by itself, or until the checkpoint is written that it writes.
        store: gives a connection to the store in which the ranks meet, or raises as long as there
            is none; asked from the thread.
        end: ends the process.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world: int,
        limits: Limits,
        expired: Callable[[str], int],
        alive: Callable[[], str | None] = lambda: None,
        store: Callable[[], dist.Store] | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.run_dir, self.rank, self.world, self.limits = run_dir, rank, world, limits
        self._expired, self._alive, self._end = expired, alive, end
        self._open_store, self._store = store, None
        self._reports_made, self._is_over = 0, False
        self._leave_by: float | None = None
        self._phase, self._step, self._since = "start", 0, time.monotonic()
        self._stopped = threading.Event()
        self._interval = min(REPORT_S, min(limits) / 4)
        self._stacks = None
        self._arm()
        self._start(self._watch, "watchdog")
        if store is not None:
            self._start(self._report_often, "watchdog-reports")

    # ---- what the run says ---------------------------------------------------------------------

    def enter(self, phase: str, step: int | None = None) -> None:
        """The run is in another phase now, or has got on in this one: its time starts anew."""
        self._phase, self._since = phase, time.monotonic()
        if step is not None:
            self._step = step
        self._arm()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within, the run is in `phase`; behind it, in the one before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stop(self) -> None:
        """The run has ended: nothing is watched any more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            self._stacks.close()
            path, self._stacks = Path(self._stacks.name), None
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    # ---- the threads ---------------------------------------------------------------------------

    @staticmethod
    def _start(work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            phase, step, since = self._phase, self._step, self._since
            spent, limit = time.monotonic() - since, self.limits.of(phase)
            if spent <= limit:
                self._look_around(phase, step)
            elif since == self._since:  # not ended at this very moment
                self._expire(phase, step, spent)
                return

    def _look_around(self, phase: str, step: int) -> None:
        reason = self._alive()
        if reason is None:
            return
        self._leave_by = self._leave_by or time.monotonic() + GRACE_S
        if phase != "save" and time.monotonic() > self._leave_by:
            self._finish(
                f"{reason}; it could not stop by itself within {GRACE_S:.0f} s in "
                f"{phase} (step {step}); stacks of rank {self.rank}: {self._dump()}"
            )

    def _report_often(self) -> None:
        """In a thread of its own: a store whose server has stopped holds a caller up for ever."""
        while not self._stopped.wait(self._interval):
            self._report()

    def _report(self) -> None:
        self._reports_made += 1
        report = {
            "phase": self._phase,
            "step": self._step,
            "number": self._reports_made,
            "over": self._is_over,
        }
        try:
            self._store = self._store or self._open_store()
            self._store.set(_key(self.rank), json.dumps(report))
        except (OSError, RuntimeError) as error:  # it may come, or come back; the limit decides
            log.debug("the store does not answer: %s", error)

    def _expire(self, phase: str, step: int, spent: float) -> None:
        self._is_over = True
        where = f"step {step}" if phase == "step" else f"{phase} (step {step})"
        reason = (
            f"no progress for {spent:.0f} s in {where}; {self._others(phase, step)}; stacks of "
            f"rank {self.rank}: {self._dump()}"
        )
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        log.error("%s", reason)
        code = 1
        try:
            code = self._expired(reason)
        finally:
            self._end(code)

    def _dump(self) -> str:
        if self._stacks is None:
            return "not written (logs/ could not be)"
        print(
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            f"rank {self.rank}, {self._phase}, step {self._step}",
            file=self._stacks,
            flush=True,
        )
        main = sys._current_frames().get(threading.main_thread().ident)
        # First, and by itself: faulthandler shows at most 100 threads, the newest ones.
        stack = "".join(traceback.format_stack(main))
        print(f"Main thread:\n{stack}", file=self._stacks, flush=True)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        return str(Path(self._stacks.name).relative_to(self.run_dir))

    def _others(self, phase: str, step: int) -> str:
        """Which ranks this one probably waits for, in words."""
        if self.world == 1:
            return "it is alone"
        if self._store is None:
            return "no store answers where the ranks meet: rank 0 or its node is not there"
        found: list[str] = []
        asking = self._start(lambda: found.append(self._ask(phase, step)), "watchdog-asks")
        asking.join(2 * self._interval + 6)
        return found[0] if found else STORE_IS_GONE

    def _ask(self, phase: str, step: int) -> str:
        """What the store knows of the other ranks."""
        try:
            earlier = self._reports()
            time.sleep(2 * self._interval + 1)  # clocks of nodes differ, so numbers are compared
            reports = self._reports()
        except (OSError, RuntimeError):
            return STORE_IS_GONE
        never = [r for r in range(self.world) if r != self.rank and r not in reports]
        silent = [
            rank
            for rank, report in reports.items()
            if report == earlier.get(rank) and not report["over"]
        ]
        if never or silent:
            return _named(
                [f"rank {rank} has never reported" for rank in never]
                + [f"rank {rank} does not report any more" for rank in silent]
            )
        return (
            _named(
                [
                    f"rank {rank} is in {report['phase']} of step {report['step']}"
                    for rank, report in reports.items()
                    if (report["phase"], report["step"]) != (phase, step)
                ]
            )
            or "all ranks report the same"
        )

    def _reports(self) -> dict[int, dict]:
        """rank -> its latest report, this rank left out; without those that never reported."""
        keys = {rank: _key(rank) for rank in range(self.world) if rank != self.rank}
        found = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in found.items()}

    def _arm(self) -> None:
        """Let faulthandler end this process if its threads cannot."""
        if self._stacks is None:
            path = self.run_dir / "logs" / f"stacks_rank_{self.rank:05d}.txt"
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._stacks = path.open("a", encoding="utf-8")  # beside those of earlier starts
        if self._stacks is not None:
            limit = self.limits.of(self._phase) + _LAST_RESORT_S
            faulthandler.dump_traceback_later(limit, exit=True, file=self._stacks)


def _key(rank: int) -> str:
    """Its name in the store, which may outlive a restart of the ranks."""
    return f"omnipretrain/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _named(parts: list[str]) -> str:
    more = len(parts) - _NAMED
    return ", ".join(parts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def meeting_place(timeout: timedelta = timedelta(seconds=5)) -> dist.Store:
    """A connection of its own to the store in which the ranks meet; raises where none answers.

    While the main thread waits for something in the store, its connection is busy.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torch would retry for long, and print stacks of C++ on each rank.
    socket.create_connection((host, port), timeout=timeout.total_seconds()).close()
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
