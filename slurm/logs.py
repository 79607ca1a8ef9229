"""Read a run's logs: the newest log of its jobs, or that of a rank.

python -m slurm.logs RUN [-f] [--rank N]
"""

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_PAUSE_S = 0.5


def log_of(run: Path, rank: int | None) -> Path | None:
    """The file to read; None if the run has none yet."""
    if rank is not None:
        path = run / "logs" / f"rank_{rank:05d}.log"
        return path if path.is_file() else None
    for pattern in ("job-*.log", "rank_00000.log"):
        if found := list(run.glob(f"logs/{pattern}")):
            return max(found, key=lambda path: path.stat().st_mtime)
    return None


def follow(run: Path, path: Path, lines: int) -> None:
    """Copy a job's log as it grows, and go on with that of the next job of the run."""
    out, seen = sys.stdout, {path, *run.glob("logs/job-*.log")}
    file = path.open(encoding="utf-8", errors="replace")
    out.writelines(deque(file, maxlen=lines))
    while True:
        out.write(file.read())
        out.flush()
        newest = log_of(run, None)
        if newest is not None and newest not in seen:
            out.write(file.read())  # what came while the next one was made
            seen.add(newest)
            file.close()
            file = newest.open(encoding="utf-8", errors="replace")
            print(f"==> {newest} <==", file=sys.stderr, flush=True)
            continue
        time.sleep(_PAUSE_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; becomes `tail`, but where there are further jobs to follow."""
    parser = argparse.ArgumentParser(prog="slurm logs", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on as lines come, in the next job too"
    )
    parser.add_argument("-n", "--lines", type=int, default=50)
    parser.add_argument("--rank", type=int, help="the log of this rank")
    options = parser.parse_intermixed_args(argv)
    path = log_of(options.run, options.rank)
    if path is None:
        ranks = sorted(p.name for p in options.run.glob("logs/rank_*.log"))
        there = f"; there are {ranks[0]} to {ranks[-1]}" if ranks else ""
        print(f"{options.run / 'logs'} has no such log{there}", file=sys.stderr)
        return 1
    print(f"==> {path} <==", file=sys.stderr, flush=True)
    if options.follow and options.rank is None:
        try:
            follow(options.run, path, options.lines)
        except KeyboardInterrupt:
            return 0
    tail = ["tail", f"--lines={options.lines}", *(["--follow=name"] if options.follow else [])]
    os.execvp("tail", [*tail, str(path)])


if __name__ == "__main__":
    sys.exit(main())
