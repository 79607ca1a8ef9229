"""Two ranks of a module, and the launcher above them, as forks: what tests of signals start.

    start_ranks("tests.distributed.launched_ranks", ["pretrain.train", ...], 1, folder)

The launcher bears torchrun's name, so that its ranks take it for the launcher that started them. It
leaves with 0 if both ranks do; with LATE if one has ended and the other one does not notice.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from pretrain.engine.control import watchdog
from tests.distributed.launch import free_port, rank_environment

WORLD, LATE, PATIENCE_S = 2, 99, 40.0


def main() -> int:
    """Start the ranks, wait for them; their process numbers are in ranks.json beside the output."""
    call_this("torchrun")
    watchdog.REPORT_S = 0.5  # how often ranks look for their launcher: short runs should notice
    port = free_port()
    ranks = [start(rank, port) for rank in range(WORLD)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # it waits for its ranks
    path = Path(os.readlink("/proc/self/fd/1")).with_name("ranks.json")
    path.with_suffix(".new").write_text(json.dumps(ranks), encoding="utf-8")
    path.with_suffix(".new").rename(path)
    codes: dict[int, int] = {}
    until = float("inf")
    while len(codes) < WORLD and time.monotonic() < until:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            until = time.monotonic() + PATIENCE_S
        time.sleep(0.02)
    for pid in set(ranks) - set(codes):
        os.kill(pid, signal.SIGKILL)
        codes[pid] = LATE
    return next((abs(code) for code in codes.values() if code), 0)


def start(rank: int, port: int) -> int:
    """Fork a rank, with a session of its own; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.update(rank_environment(rank, WORLD, port), CROSS_RANK="0")  # as deepspeed does
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def call_this(name: str) -> None:
    """Show `name` as the command of this process."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    first, end = int(fields[45]), int(fields[46])  # where the kernel finds its arguments
    ctypes.memset(first, 0, end - first)
    ctypes.memmove(first, name.encode(), len(name))


if __name__ == "__main__":
    sys.exit(main())
