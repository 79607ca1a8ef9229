"""Is this node fit for the run? One JSON line; the supervisor asks every node before a start.

    python -m slurm.health RUN --gpus N --token T

Standard library only. What it cannot see (a slow link, a wrong sum) the run itself will show.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TOKEN_FILE = "health_token"
_LEAST_FREE_BYTES = 2**30
_MOST_SKEW_S = 10.0
_LEAST_FREE_MEMORY = 0.9


def gpu_faults(wanted: int) -> list[str]:
    """GPUs that are missing, or whose memory a process that was left behind still holds."""
    if not wanted:
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        memory = [[float(n) for n in line.split(",")] for line in listed.split("\n") if line]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [f"nvidia-smi: {error}"]
    faults = [] if len(memory) == wanted else [f"{len(memory)} GPUs instead of {wanted}"]
    return faults + [
        f"GPU {number}: {free:.0f} of {total:.0f} MB free"
        for number, (free, total) in enumerate(memory)
        if free < _LEAST_FREE_MEMORY * total
    ]


def folder_faults(run: Path, token: str) -> list[str]:
    """The run directory: shared with the supervisor, writable, with space, by the same clock."""
    faults = []
    try:
        found = (run / "control" / TOKEN_FILE).read_text(encoding="utf-8")
    except OSError as error:
        return [f"the run directory is not the supervisor's: {error}"]
    if found != token:
        return [f"{run} is another folder here than where the supervisor runs"]
    probe = run / "control" / f".health-{os.uname().nodename}-{os.getpid()}"
    try:
        probe.write_text(token, encoding="utf-8")
        skew_s = time.time() - probe.stat().st_mtime
        probe.unlink()
    except OSError as error:
        return [f"cannot write into the run directory: {error}"]
    if abs(skew_s) > _MOST_SKEW_S:
        faults.append(f"the clock is {skew_s:+.0f} s off that of the run directory's file system")
    for folder in {run, Path(tempfile.gettempdir())}:
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE_BYTES:
            faults.append(f"{folder} has {free / 2**20:.0f} MB left")
    return faults


def reports(pattern: Path, nodes: Sequence[str], per_node: int = 1) -> dict[str, list[str]]:
    """Faults of each node, from the lines that the tasks of a check have written.

    A line names its node, or a rank of the run; several speak for a node with several ranks.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(pattern.parent.glob(pattern.name)):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
                report = json.loads(line)  # a warning of SLURM's or of a module is none
                node = report.get("node") or nodes[report["rank"] // per_node]
                found.setdefault(node, []).extend(report["faults"])
    return {node: found.get(node, ["it gave no answer"]) for node in nodes}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the report, returns 0 whatever it says."""
    parser = argparse.ArgumentParser(prog="slurm.health", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--token", default="")
    options = parser.parse_args(argv)
    faults = gpu_faults(options.gpus) + folder_faults(options.run, options.token)
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    print(json.dumps({"node": node, "faults": faults}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
