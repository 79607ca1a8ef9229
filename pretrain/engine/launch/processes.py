"""Processes of this machine: which one a number means, and since when it runs."""

import os
import time
from pathlib import Path


def process_age(pid: int) -> float | None:
    """Seconds since a process of this machine started; None where /proc does not say."""
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def this_machine() -> str | None:
    """Where a process number means something: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None if it has ended."""
    try:
        # The name of the program stands in brackets, and may hold any.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, start = fields[0], int(fields[19])
    return None if state in (b"Z", b"X") else start
