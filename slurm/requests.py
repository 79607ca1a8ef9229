"""Ask a run for something: to stop, to save, or its jobs to be gone.

python -m slurm stop RUN        saves at the next step and ends; nothing is requeued
python -m slurm save RUN        saves and goes on
python -m slurm cancel RUN      ends its jobs now, on all nodes; the last checkpoint stays
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm import cluster
from slurm.owner import supervisor_here
from slurm.run_files import age, control, last_checkpoint, read_json, status


def stop(run: Path, wait_s: float) -> int:
    """Ask for a stop and wait for it; what waits in the queue is cancelled."""
    control(run, "stop").parent.mkdir(parents=True, exist_ok=True)
    control(run, "stop").touch()
    waiting = [j["job"] for j in cluster.jobs_of(run) if j["state"] in cluster.WAITING]
    if waiting:
        cluster.ask("scancel", *waiting)
    said = _wait(lambda: not _is_at_work(run), wait_s, f"{run} to save and stop")
    print(
        f"{run}: {status(run).get('state', 'not started')}, checkpoint of step "
        f"{last_checkpoint(run)}"
    )
    return 0 if said else 1


def save(run: Path, wait_s: float) -> int:
    """Ask for a checkpoint and wait for it."""
    if not _is_at_work(run):
        print(f"{run} is not running ({status(run).get('state', 'new')})", file=sys.stderr)
        return 1
    control(run, "save").touch()
    done = _wait(lambda: not control(run, "save").exists(), wait_s, f"{run} to save")
    print(f"{run}: checkpoint of step {last_checkpoint(run)}")
    return 0 if done else 1


def cancel(run: Path, wait_s: float) -> int:
    """End the jobs of a run, or its supervisor where there is no SLURM."""
    jobs = [job["job"] for job in cluster.jobs_of(run)]
    if jobs:
        cluster.ask("scancel", "--full", *jobs, check=True)
        done = _wait(lambda: not cluster.jobs_of(run), wait_s, "the jobs to end")
        print(f"cancelled: {', '.join(jobs)}")
        return 0 if done else 1
    supervisor = read_json(control(run, "supervisor.json"))
    if supervisor.get("host") != os.uname().nodename:
        print(
            f"{run} has no jobs"
            + (f"; its supervisor runs on {supervisor['host']}" if supervisor else ""),
            file=sys.stderr,
        )
        return 1
    with contextlib.suppress(ProcessLookupError):
        control(run, "stop").touch()  # so that it starts nothing any more
        os.kill(int(supervisor["pid"]), signal.SIGTERM)
    done = _wait(lambda: not Path(f"/proc/{supervisor['pid']}").exists(), wait_s, "it to end")
    return 0 if done else 1


def _is_at_work(run: Path) -> bool:
    """Whether a trainer or a supervisor still looks after the run."""
    silent = age(control(run, "heartbeat"))
    alive = silent is not None and silent < 60.0
    busy = status(run).get("state") in ("running", "starting") and alive
    return busy or bool(supervisor_here(run)) or bool(cluster.jobs_of(run))


def _wait(done: Callable[[], bool], wait_s: float, what: str) -> bool:
    until = time.monotonic() + wait_s
    said = 0.0
    while not done():
        if time.monotonic() > until:
            print(f"waited {wait_s:.0f} s for {what}; it has not happened yet", file=sys.stderr)
            return False
        if time.monotonic() - said > 10:
            print(f"waiting for {what} ...", file=sys.stderr, flush=True)
            said = time.monotonic()
        time.sleep(0.5)
    return True


VERBS = {"stop": stop, "save": save, "cancel": cancel}


def main(argv: Sequence[str] | None = None, verb: str = "stop") -> int:
    """Entry point of one verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"slurm {verb}", description=VERBS[verb].__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--wait",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="give up waiting after so long; the request stays (default 1800)",
    )
    options = parser.parse_intermixed_args(argv)
    run = options.run.resolve()
    if not run.is_dir():
        print(f"{options.run} is no run directory", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](run, options.wait)
    except cluster.SlurmError as error:
        print(error, file=sys.stderr)
        return 1
