"""Which ranks of this node have ended without a word, and by which signal.

A rank that is killed says nothing; what its peers see is that a connection closed. So ranks tell
each other their process numbers when they meet, and one that loses a connection looks who is gone.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|peer|socket|remote process|"
    r"timed out|timeout|ncclremoteerror",
    re.IGNORECASE,
)


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int


def own_place() -> Place:
    """Of this process."""
    return Place(socket.gethostname(), os.getpid())


def speaks_of_a_peer(error: BaseException) -> bool:
    """Whether an error may be no more than the echo of another rank's end."""
    return isinstance(error, RuntimeError) and bool(_CONNECTION.search(str(error)))


def ended_peers(places: Sequence[Place], rank: int, patience_s: float = 1.0) -> list[str]:
    """The other ranks of this node that run no more, in words; waits a moment for one.

    Args:
        places: of each rank.
        rank: this one.
    """
    here = places[rank].host
    others = {r: p.pid for r, p in enumerate(places) if p.host == here and r != rank}
    until = time.monotonic() + patience_s
    while True:
        found = [said for r, pid in others.items() if (said := _end_of(r, pid))]
        if found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def _end_of(rank: int, pid: int) -> str | None:
    """How a process has ended, if it has. Its launcher takes the exit code away soon."""
    name = f"rank {rank} (process {pid})"
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return f"{name} is gone"
    if fields[0] not in (b"Z", b"X"):
        return None
    code = int(fields[49])
    if number := code & 0x7F:
        return f"{name} was ended by {signal.Signals(number).name}"
    return f"{name} ended with exit code {code >> 8}"
