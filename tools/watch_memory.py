"""Run a command, say what memory it takes while it runs, and end it before the machine has none.

    python -m tools.watch_memory -- python -m pretrain.train internimage_h_cpu

Every line of its output is shown behind the seconds since the start and the memory of all its
processes at that time. Pages that processes share count once (PSS). The peak is that of anonymous
and shared memory: pages of files are the system's to take back. Exit code: the command's; 3 if it
was ended to keep `--keep-free` GiB available. Linux only.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from data_pipeline.console import parse_in_any_order, write_utf8
from tools.support.process_memory import KINDS, proportional

GIB = 2**30
ENDED = 3


@dataclass(frozen=True)
class Reading:
    """Memory of a process and all its descendants at one time, in bytes."""

    seconds: float
    processes: int
    anonymous: int
    shared: int
    """POSIX shared memory, for example batches on their way from loader workers."""
    files: int
    """Pages of mapped files, for example of a checkpoint that is read."""

    @property
    def held(self) -> int:
        """What the system cannot take back."""
        return self.anonymous + self.shared


@dataclass
class Watch:
    """Samples the memory of a process tree in a thread, and ends it when memory gets scarce."""

    process: subprocess.Popen
    keep_free: float
    """GiB that must stay available."""
    every: float
    """Seconds between two readings."""
    started: float = field(default_factory=time.monotonic)
    readings: list[Reading] = field(default_factory=list)
    ended: bool = False

    def run(self) -> None:
        """Read until the process has ended."""
        while self.process.poll() is None:
            reading = read_tree(self.process.pid, time.monotonic() - self.started)
            self.readings.append(reading)
            if psutil.virtual_memory().available < self.keep_free * GIB:
                self.ended = True
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(self.process.pid, signal.SIGKILL)
            time.sleep(self.every)

    def peak(self) -> Reading | None:
        """The reading with most memory held; None if the command was too short for any."""
        return max(self.readings, key=lambda reading: reading.held, default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    write_utf8()
    options = parse_arguments(argv)
    process = subprocess.Popen(
        options.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    watch = Watch(process, options.keep_free, options.every)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        show(process.stdout, watch)
        process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
    thread.join()
    report(watch, options.out)
    return ENDED if watch.ended else process.returncode


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="tools.watch_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--keep-free",
        type=float,
        default=1.0,
        metavar="GIB",
        help="end the command when less is available (default %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two readings (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write all readings there, as JSON lines")
    parser.add_argument("command", nargs="+", help="behind --")
    return parse_in_any_order(parser, argv)


def show(output: IO[str] | None, watch: Watch) -> None:
    """Print the command's lines with time and memory before them."""
    for line in output or ():
        now = watch.readings[-1].held / GIB if watch.readings else 0.0
        seconds = time.monotonic() - watch.started
        print(f"{seconds:7.1f} s {now:6.2f} GiB  {line.rstrip()}", flush=True)


def report(watch: Watch, out: Path | None) -> None:
    """Print the peak; write the readings."""
    if out is not None:
        rows = [json.dumps(vars(reading)) + "\n" for reading in watch.readings]
        out.write_text("".join(rows), encoding="utf-8")
    if watch.ended:
        print(f"ended: less than {watch.keep_free:g} GiB were available", file=sys.stderr)
    if (peak := watch.peak()) is not None:
        print(
            f"peak: {peak.held / GIB:.2f} GiB held after {peak.seconds:.0f} s by "
            f"{peak.processes} processes ({peak.anonymous / GIB:.2f} anonymous, "
            f"{peak.shared / GIB:.2f} shared), beside {peak.files / GIB:.2f} of files"
        )


def read_tree(pid: int, seconds: float) -> Reading:
    """Memory of a process and its descendants now; those that have just ended count nothing."""
    totals, processes = dict.fromkeys(KINDS, 0), 0
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        tree = []
    for process in tree:
        found = proportional(process.pid)
        processes += bool(found)
        for kind, size in found.items():
            totals[kind] += size
    return Reading(seconds, processes, *(totals[kind] for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
