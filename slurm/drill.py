"""Do to a running job what a cluster may, and tell what it cost: before you trust a site.

    python -m slurm.drill RUN --kill-rank | --hang | --preempt | --kill-node

It reaches the job's nodes through SLURM (`srun --overlap`). The run goes on from its last
checkpoint; the drill waits for its next step.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import cluster
from slurm.run_files import control, last_checkpoint, read_attempts, read_json
from slurm.status import train_lines

# ALL: processes of the run's launcher on this node, which have a step that is not this one's, and
# neither the supervisor nor its guard. RANKS: those of them that run the trainer, workers behind.
_FIND = r"""
for p in $(pgrep -f . | grep -vx $$); do
  is=$(tr '\0' '\n' < /proc/$p/environ 2>/dev/null) || continue
  printf '%s\n' "$is" | grep -qxF "SLURM_JOB_ID=$SLURM_JOB_ID" || continue
  printf '%s\n' "$is" | grep -qxF "SLURMD_NODENAME=$SLURMD_NODENAME" || continue
  step=$(printf '%s\n' "$is" | sed -n 's/^SLURM_STEP_ID=//p')
  [ -n "$step" ] && [ "$step" != "$SLURM_STEP_ID" ] || continue
  ALL="$ALL $p"
  tr '\0' ' ' < /proc/$p/cmdline | grep -Eq "^[^ ]*python[^ ]*( -u)? -m $0( |\$)" || continue
  RANKS="$RANKS $p"
done
[ -n "$RANKS" ] || { echo "no rank of $0 on $SLURMD_NODENAME" >&2; exit 1; }
set -- $RANKS
"""
FAULTS = {
    "kill-rank": ("SIGKILL to one rank on the last node", "kill -KILL $1"),
    "hang": ("SIGSTOP to one rank on the last node", "kill -STOP $1"),
    "kill-node": ("SIGKILL to all processes of the run on the last node", "kill -KILL $ALL"),
    "preempt": ("SIGTERM to the batch script, as a preemption sends it", ""),
}


def last_step(run: Path) -> int:
    """The newest step that the run has logged or saved."""
    lines = train_lines(run)
    return max(lines[-1]["step"] if lines else 0, last_checkpoint(run))


def strike(fault: str, job: dict[str, str], module: str) -> None:
    """Do it to a running job, whose ranks are `python -m module`.

    Raises:
        cluster.SlurmError: SLURM refuses.
    """
    if fault == "preempt":
        cluster.ask("scancel", "--batch", "--signal=TERM", job["job"], check=True)
        return
    last = cluster.ask("scontrol", "show", "hostnames", job["nodes"], check=True).split()[-1]
    cluster.ask(
        "srun",
        f"--jobid={job['job']}",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={last}",
        "sh",
        "-c",
        _FIND + FAULTS[fault][1],
        module,
        check=True,
    )


def drill(run: Path, fault: str, wait_s: float) -> int:
    """Strike, wait until the run has made a step in a new try, report."""
    running = [job for job in cluster.jobs_of(run) if job["state"] == "RUNNING"]
    if not running:
        print(f"{run} has no running job", file=sys.stderr)
        return 2
    tries, before, start = len(read_attempts(run)), last_step(run), time.time()
    print(
        f"{FAULTS[fault][0]}, job {running[0]['job']}, at step {before} (checkpoint "
        f"{last_checkpoint(run)}) ...",
        flush=True,
    )
    module = read_json(control(run, "supervisor.json")).get("module", "pretrain.train")
    strike(fault, running[0], module)
    while time.time() - start < wait_s:
        time.sleep(1)
        attempts = read_attempts(run)
        if len(attempts) <= tries:
            continue
        ended = attempts[tries]
        kept = ended["steps"][1]
        lines = [
            line for line in train_lines(run) if line["time"] > ended["started"] + ended["seconds"]
        ]
        if lines or last_checkpoint(run) > kept:
            print(
                f"the try ended after {ended['started'] + ended['seconds'] - start:.0f} s "
                f"({ended['reason'] or ended['why']}) and was followed by: {ended['decision']}\n"
                f"going on from step {kept}: {max(before - kept, 0)} steps are done again; the "
                f"next step is there after {time.time() - start:.0f} s"
            )
            return 0
    print(
        f"after {wait_s:.0f} s the run has not made a step again: python -m slurm status {run}",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 the run went on, 1 it did not, 2 there is nothing to strike."""
    parser = argparse.ArgumentParser(prog="slurm drill", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    for name, (what, _) in FAULTS.items():
        which.add_argument(f"--{name}", dest="fault", action="store_const", const=name, help=what)
    parser.add_argument(
        "--wait",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="for the run to go on (default 3600)",
    )
    options = parser.parse_intermixed_args(argv)
    try:
        return drill(options.run.resolve(), options.fault, options.wait)
    except cluster.SlurmError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
