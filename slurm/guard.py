"""Stands between a supervisor and a launcher; when either is gone, so is all that was started.

    python -m slurm.guard SECONDS COMMAND ...

Launchers leave ranks behind: `deepspeed` after SIGTERM or SIGKILL, `torchrun` after SIGUSR1 or
SIGKILL. Orphans become children of this process, which lets them save and leave for so many
seconds and then ends them. If this process is killed, the supervisor adopts them and does the same.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_DIES_WITHIN_S = 60.0


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


def end_descendants(patience_s: float, dies_within_s: float = _DIES_WITHIN_S) -> list[int]:
    """Let what is left below this process go by itself, then end it; returns who had to be.

    Ranks notice that their launcher is gone, save, and leave; SIGKILL comes after `patience_s`. One
    that waits in the kernel (for a file server that is gone) may outlive it: that is waited for
    `dies_within_s` and no longer.
    """
    ended, start = set(), time.monotonic()
    while left := descendants(os.getpid()):
        spent = time.monotonic() - start
        if spent > patience_s + dies_within_s:
            print(f"guard: processes {left} cannot be ended", file=sys.stderr, flush=True)
            break
        for pid in left if spent >= patience_s else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                ended.add(pid)
        with contextlib.suppress(ChildProcessError):  # adopted ones that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)
    return sorted(ended)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is the launcher's, 128 + N after signal N."""
    parser = argparse.ArgumentParser(
        prog="slurm.guard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patience_s", metavar="SECONDS", type=float)
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("say what to run")
    told = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    adopt_orphans()
    child = subprocess.Popen(options.command, preexec_fn=die_with_parent)
    while child.poll() is None and not told:
        time.sleep(0.1)
    if told:  # the supervisor is gone, or wants an end
        child.terminate()
        try:
            child.wait(options.patience_s)
        except subprocess.TimeoutExpired:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_DIES_WITHIN_S)
    if killed := end_descendants(options.patience_s):
        print(
            f"guard: {len(killed)} processes outlived their launcher and were ended: {killed}",
            file=sys.stderr,
            flush=True,
        )
    code = -signal.SIGKILL if child.returncode is None else child.returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
