"""A run of the trainer among random faults, one after the other, and what they cost.

    python -m tests.slurm.goodput_drill --minutes 30 [--every 2] [--seed 1]

On an emulated cluster of three nodes, of which the run takes two (a spare stands in for one that is
lost). At the end its steps are compared with those of an uninterrupted run, bit for bit.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from slurm import goodput
from slurm.status import describe
from tests.slurm.conftest import DevCluster, attempts, dev_cluster, why_not
from tests.slurm.trainer_runs import TrainerRun, assert_same
from tests.tiny_run import pack_scenes

FAULTS = ("a rank is killed", "a node is lost", "preemption")


def strike(cluster: DevCluster, fault: str, nodes: list[str], job: str) -> None:
    """Let it happen to the running job."""
    if fault == "a rank is killed":
        drill = "from slurm.drill import strike; strike('kill-rank', {!r}, 'pretrain.train')"
        cluster.ask(sys.executable, "-c", drill.format({"job": job, "nodes": ",".join(nodes)}))
    elif fault == "a node is lost":
        cluster.do("fail-node", nodes[0])
        time.sleep(20)  # it reboots
        cluster.do("start-node", nodes[0])
    else:
        cluster.ask(
            "sbatch",
            "--partition=high",
            "--nodes=3",
            "--exclusive",
            "--wrap=sleep 5",
            "--output=/dev/null",
        )


def after(run: Path, struck: float, step: int, fault: str) -> str:
    """How long the run took from a fault to its next step in another try."""
    tries = [start for start, _ in goodput.tries_of(run, time.time()) if start > struck]
    steps = [at for _, at in goodput.lines_of(run) if tries and at > tries[0]]
    took = f"the next one after {steps[0] - struck:.0f} s" if steps else "none since"
    return f"{fault} at step {step}: {took}"


def work(folder: Path, minutes: float, every: float, seed: int) -> dict:
    """Run, strike, stop, compare; returns what `status` says of the run."""
    pack_scenes(folder / "data")
    chosen, began = random.Random(seed), time.monotonic()
    faults, moments = int(minutes / every) - 1, []
    with dev_cluster(3) as cluster:
        run = TrainerRun(
            cluster,
            folder / "work",
            folder / "data",
            steps=100_000,
            checkpoint__every_steps=10,
            tasks__caption__global_batch=128,
            tasks__caption__micro_batch=16,
        )
        (job,) = run.submit("--nodes", "2", "--time", "600")
        for number in range(1, faults + 1):
            time.sleep(max(began + 60 * every * number - time.monotonic(), 0))
            fault = chosen.choice(FAULTS)
            moments.append((time.time(), run.last(), fault))
            where = cluster.ask("squeue", "--noheader", "--format=%N", f"--jobs={job}")
            if where:  # else it still waits for the last one to be over
                nodes = cluster.ask("scontrol", "show", "hostnames", where).split()
                strike(cluster, fault, nodes, job)
        time.sleep(max(began + 60 * minutes - time.monotonic(), 0))
        found = describe(run.run)
        for moment in moments:
            print(after(run.run, *moment), flush=True)
        run.slurm("stop", str(run.run))
        print(
            f"{faults} faults in {minutes:g} minutes, {len(attempts(run.run))} tries, "
            f"{run.last()} steps of {found['seconds_a_step']:.2f} s; "
            f"{goodput.words(found['time'])}",
            flush=True,
        )
        assert_same(run, patience_s=240 * minutes)
        print("each step was made once, and is as in the uninterrupted run")
        return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=2.0, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        work(Path(folder), options.minutes, options.every, options.seed)


if __name__ == "__main__":
    main()
