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
from slurm.attempts import read_attempts
from slurm.run_files import last_checkpoint
from slurm.status import train_lines

# P: ranks of this job on this node, and neither the supervisor nor its launcher, which name the
# trainer too.
_FIND = r"""
for p in $(pgrep -f '^[^ ]*python[^ ]*( -u)? -m [^ ]*(pretrain.train|toy_trainer)'); do
  for is in "SLURM_JOB_ID=$SLURM_JOB_ID" "SLURMD_NODENAME=$SLURMD_NODENAME"; do
    tr '\0' '\n' < /proc/$p/environ | grep -qxF "$is" || continue 2
  done
  P="$P $p"
done
set -- $P
"""
FAULTS = {
    "kill-rank": ("SIGKILL to one rank on the last node", "kill -KILL $1"),
    "hang": ("SIGSTOP to one rank on the last node", "kill -STOP $1"),
    "kill-node": ("SIGKILL to all ranks on the last node", "kill -KILL $P"),
    "preempt": ("SIGTERM to the batch script, as a preemption sends it", ""),
}


def last_step(run: Path) -> int:
    """The newest step that the run has logged or saved."""
    lines = train_lines(run)
    return max(lines[-1]["step"] if lines else 0, last_checkpoint(run))


def strike(fault: str, job: dict[str, str]) -> None:
    """Do it to a running job.

    Raises:
        cluster.SlurmError: SLURM refuses.
    """
    if fault == "preempt":
        cluster.ask("scancel", "--batch", "--signal=TERM", job["job"], check=True)
        return
    last = cluster.ask("scontrol", "show", "hostnames", job["nodes"], check=True).split()[-1]
    cluster.ask("srun", f"--jobid={job['job']}", "--overlap", "--nodes=1", "--ntasks=1",
                f"--nodelist={last}", "sh", "-c", _FIND + FAULTS[fault][1], check=True)


def drill(run: Path, fault: str, wait_s: float) -> int:
    """Strike, wait until the run has made a step in a new try, report."""
    running = [job for job in cluster.jobs_of(run) if job["state"] == "RUNNING"]
    if not running:
        print(f"{run} has no running job", file=sys.stderr)
        return 2
    tries, before, start = len(read_attempts(run)), last_step(run), time.time()
    print(f"{FAULTS[fault][0]}, job {running[0]['job']}, at step {before} (checkpoint "
          f"{last_checkpoint(run)}) ...", flush=True)
    strike(fault, running[0])
    while time.time() - start < wait_s:
        time.sleep(1)
        attempts = read_attempts(run)
        if len(attempts) <= tries:
            continue
        ended = attempts[tries]
        kept = ended["steps"][1]
        lines = [line for line in train_lines(run) if line["time"] > ended["started"]
                 + ended["seconds"]]
        if lines or last_checkpoint(run) > kept:
            print(f"the try ended after {ended['started'] + ended['seconds'] - start:.0f} s "
                  f"({ended['reason'] or ended['why']}) and was followed by: {ended['decision']}\n"
                  f"going on from step {kept}: {max(before - kept, 0)} steps are done again; the "
                  f"next step is there after {time.time() - start:.0f} s")
            return 0
    print(f"after {wait_s:.0f} s the run has not made a step again: python -m slurm status {run}",
          file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 the run went on, 1 it did not, 2 there is nothing to strike."""
    parser = argparse.ArgumentParser(prog="slurm drill", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    for name, (what, _) in FAULTS.items():
        which.add_argument(f"--{name}", dest="fault", action="store_const", const=name, help=what)
    parser.add_argument("--wait", type=float, default=3600.0, metavar="SECONDS",
                        help="for the run to go on (default 3600)")
    options = parser.parse_intermixed_args(argv)
    try:
        return drill(options.run.resolve(), options.fault, options.wait)
    except cluster.SlurmError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
