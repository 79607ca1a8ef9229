"""A drill on a real SLURM does what it says, and the run goes on from its last checkpoint."""

import re
import sys

import pytest

from tests.slurm import test_cluster as on_cluster
from tests.slurm.conftest import attempts, rank

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
NODES = 2
FAULTS = {"kill-rank": "restart", "kill-node": "restart", "hang": "restart", "preempt": "requeue"}


def test_all_four(emulated, tmp_path):
    """Each is found in the ledger with what it led to, and told with what it cost."""
    run = tmp_path / "run"
    job = on_cluster.submit(emulated, on_cluster.write_script(run, "--steps", "100000"))
    for number, (fault, decision) in enumerate(FAULTS.items()):
        on_cluster.make_steps(run, 25)
        before = [rank(run, n)["pid"] for n in range(4)]
        said = emulated.ask(
            sys.executable, "-m", "slurm", "drill", str(run), f"--{fault}", "--wait", "90"
        )
        told = re.search(
            r"was followed by: (\w+)\n.*?(\d+) steps are done again; the next step is "
            r"there after (\d+) s",
            said,
        )
        assert told and told[1] == decision, said
        assert int(told[2]) < 40 and int(told[3]) < 90, said  # a checkpoint each 10 steps
        last = attempts(run)[number]
        assert last["decision"] == decision and last["steps"][1] > last["steps"][0]
        assert ("no sign of life" in last["reason"]) == (fault == "hang")
        assert not set(before) & {rank(run, n)["pid"] for n in range(4)}
    emulated.ask(sys.executable, "-m", "slurm", "cancel", str(run))
    emulated.wait_state(job, "CANCELLED")
    on_cluster.steps_are_whole(run)
