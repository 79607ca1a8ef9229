"""A real SLURM on emulated nodes, for the tests marked `slurm`."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/devcluster.sh"
CLUSTERS = 16
"""So many may run beside each other: each has ports, and numbers of jobs, of its own."""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def why_not() -> str:
    """Why no SLURM can be started here, or ""."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        return "a SLURM with emulated nodes takes root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return (
            f"no {', '.join(missing)} here: apt-get install --no-install-recommends slurmctld "
            "slurmd slurm-client munge"
        )
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "nodes are emulated with namespaces, which this machine does not allow"
    return ""


class DevCluster:
    """The cluster of slurm/devcluster.sh, and what tests ask of it."""

    def __init__(self, folder: Path, nodes: int, slot: int) -> None:
        self.environment = os.environ | {
            "SLURM_DEV_DIR": str(folder),
            "SLURM_DEV_NODES": str(nodes),
            "SLURM_DEV_LINK": "0",
            "SLURM_DEV_PORT": str(20_000 + 100 * slot),
            "SLURM_DEV_JOB": str(1 + 38 * slot),  # ranks meet at ports from 15,000 + 8 x job on
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "PYTHONPATH": str(ROOT),
        }

    def do(self, *words: str) -> None:
        """A verb of devcluster.sh."""
        # The daemons keep a pipe open that they inherit: output goes to a file.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
            done = subprocess.run(
                [str(SCRIPT), *words], env=self.environment, stdout=said, stderr=said, check=False
            )
            said.seek(0)
            assert done.returncode == 0, said.read()

    def ask(self, *words: str, check: bool = True) -> str:
        """Output of a command on the cluster."""
        done = subprocess.run(words, env=self.environment, text=True, capture_output=True, cwd=ROOT)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job by slurmctld's memory, which needs no accounting."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job, check=False)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def wait_state(self, job: str, *states: str, seconds: float = 60) -> None:
        wait_for(
            lambda: self.state(job) in states,
            seconds,
            lambda: f"job {job} is {self.state(job)}, not {states}",
        )


def wait_for(
    done: Callable[[], object], seconds: float = 60, why: Callable[[], object] = str
) -> None:
    """Poll until true; an AssertionError with `why()` after so many seconds."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, why()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def emulated(request) -> Iterator[DevCluster]:
    """A running SLURM; a module that sets NODES has as many (4)."""
    if reason := why_not():
        pytest.skip(reason)
    with dev_cluster(getattr(request.module, "NODES", 4)) as cluster:
        yield cluster


@contextlib.contextmanager
def dev_cluster(nodes: int) -> Iterator[DevCluster]:
    """A SLURM of so many nodes, gone afterwards."""
    with one_of(CLUSTERS) as slot:
        folder = Path(tempfile.mkdtemp(prefix="devcluster-", dir="/var/tmp"))
        cluster = DevCluster(folder, nodes, slot)
        try:
            cluster.do("start")
            yield cluster
        finally:
            cluster.do("purge")
            Path(f"{folder}.lock").unlink(missing_ok=True)


@contextlib.contextmanager
def one_of(count: int) -> Iterator[int]:
    """A number below `count` that no other process of this machine has meanwhile."""
    with contextlib.ExitStack() as stack:
        while True:
            for number in range(count):
                path = f"/var/tmp/omnipretrain-devcluster-{number}.lock"
                file = stack.enter_context(open(path, "w", encoding="utf-8"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield number
                    return
                file.close()
            time.sleep(1)


def attempts(run: Path) -> list[dict]:
    """The ledger of a run."""
    try:
        text = (run / "attempts.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines()]


def steps(run: Path) -> list[int]:
    """The steps that a toy run has made, in order."""
    try:
        return [int(line) for line in (run / "steps.txt").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def rank(run: Path, number: int) -> dict:
    """Process and node of a rank of a toy run."""
    return json.loads((run / f"control/pids/rank_{number}.json").read_text(encoding="utf-8"))
