"""Processes of this machine below a supervisor: found, and ended to the last one."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process, and stay findable."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """In a child before exec: SIGTERM if the parent dies, whatever kills it.

    USR1 and USR2 are ignored, also behind the exec: they kill the launchers of torch, DeepSpeed and
    accelerate. Ranks set handlers of their own.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, all generations."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            if fields[0] not in (b"Z", b"X"):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, at = [], [pid]
    while at:
        at = [child for parent in at for child in children.get(parent, ())]
        found += at
    return found


def end_descendants(patience_s: float) -> list[int]:
    """Let what is left below this process go by itself, then end it; returns who had to be.

    Ranks notice that their launcher is gone, save, and leave; SIGKILL comes after `patience_s`.
    """
    until = time.monotonic() + patience_s
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        reap()
        time.sleep(0.2)
    killed = []
    while left := descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        reap()
        time.sleep(0.05)
    return sorted(set(killed))


def reap() -> None:
    """Take the exit codes of adopted children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
