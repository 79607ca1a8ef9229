"""Read a run's logs: the newest log of its jobs, or that of a rank.

python -m slurm.logs RUN [-f] [--rank N]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def log_of(run: Path, rank: int | None) -> Path | None:
    """The file to read; None if the run has none yet."""
    if rank is not None:
        path = run / "logs" / f"rank_{rank:05d}.log"
        return path if path.is_file() else None
    for pattern in ("job-*.log", "rank_00000.log"):
        if found := list(run.glob(f"logs/{pattern}")):
            return max(found, key=lambda path: path.stat().st_mtime)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; becomes `tail`."""
    parser = argparse.ArgumentParser(prog="slurm logs", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as lines come")
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
    tail = ["tail", f"--lines={options.lines}", *(["--follow=name"] if options.follow else [])]
    os.execvp("tail", [*tail, str(path)])


if __name__ == "__main__":
    sys.exit(main())
