"""The trainer itself on a real SLURM: what happens to its job does not show in its losses."""

import json
import os
import signal

import pytest

from tests.slurm.conftest import attempts, wait_for
from tests.slurm.trainer_runs import TrainerRun, assert_same
from tests.tiny_run import pack_scenes

pytestmark = pytest.mark.slurm
NODES = 2


@pytest.fixture(autouse=True)
def empty_cluster(emulated):
    """What a test leaves behind is not the next one's."""
    yield
    emulated.ask("scancel", "--user=root")
    wait_for(lambda: not emulated.ask("squeue", "--noheader"))
    for node in ("node1", "node2"):
        emulated.do("start-node", node)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def test_a_run_ends_as_if_nothing_had_happened(emulated, tmp_path, data):
    """Time limit, preemption, a lost node, after which one node must do: a batch of 6 fits neither
    in pairs, in micro-batches of 4."""
    run = TrainerRun(
        emulated,
        tmp_path,
        data,
        steps=200,
        checkpoint__every_steps=5,
        tasks__caption__global_batch=6,
        tasks__caption__micro_batch=4,
        tasks__caption__objective__decoder__dropout=0.0,
    )
    (job,) = run.submit("--nodes", "1-2", "--time", "30")
    run.train()
    emulated.ask("scancel", "--batch", "--signal=USR1", job)  # what the time limit's lead sends
    assert run.wait_tries(1)["decision"] == "requeue"
    run.train()
    emulated.ask(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--wrap=true",
        "--output=/dev/null",
    )
    run.wait_tries(2)
    run.train()
    emulated.do("fail-node", "node2")
    run.finish()
    emulated.wait_state(job, "COMPLETED")

    tries = attempts(run.run)
    assert [a["nodes"] for a in tries] == [["node1", "node2"]] * 3 + [["node1"]], run.story()
    # Whether the supervisor could still say something of the third depends on SLURM's haste.
    assert [tries[n]["decision"] for n in (0, 1, 3)] == ["requeue", "requeue", "done"], run.story()
    assert run.last() == 200
    assert_same(run, alone_from=tries[3]["steps"][0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_chain_of_jobs_by_other_launchers(emulated, tmp_path, data, launcher):
    """The next job of the chain goes on after the time limit of the one before."""
    run = TrainerRun(emulated, tmp_path, data, steps=100, checkpoint__every_steps=50)
    jobs = run.submit("--nodes", "2", "--time", "30", "--chain", "2", "--launcher", launcher)
    run.train()
    emulated.ask("scancel", "--batch", "--signal=USR1", jobs[0])
    run.finish()
    first, second = attempts(run.run)
    assert (first["decision"], first["state"]) == ("requeue", "stopped"), run.story()
    assert second["steps"] == [first["steps"][1], 100], run.story()
    assert_same(run)


@pytest.mark.slow
def test_every_fault_of_a_cluster(emulated, tmp_path, data):
    """Two real time limits, a killed rank, a lost batch node, a preemption, scancel."""
    run = TrainerRun(emulated, tmp_path, data, steps=400, checkpoint__every_steps=5)
    (job,) = run.submit("--nodes", "2", "--time", "30")
    for number in (1, 2):
        run.train()
        shown = emulated.ask("squeue", "--noheader", "--format=%M", f"--jobs={job}")
        minutes = int(shown.split(":")[-2]) + 1  # the lead of the signal is a minute
        emulated.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        assert "SIGUSR1" in run.wait_tries(number)["leaving"], run.story()
        emulated.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    run.train()
    said = run.slurm("drill", str(run.run), "--kill-rank")
    assert "was followed by: restart" in said
    run.train()
    emulated.do("fail-node", "node1")
    emulated.do("start-node", "node1")
    run.wait_tries(4)
    run.train()
    emulated.ask(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--wrap=true",
        "--output=/dev/null",
    )
    run.wait_tries(5)
    run.train()
    run.slurm("cancel", str(run.run), "--wait", "60")
    assert emulated.state(job) == "CANCELLED"
    run.submit("--nodes", "2", "--time", "30")
    run.finish()
    assert_same(run)


@pytest.mark.slow
def test_two_jobs_on_one_run_directory(emulated, tmp_path, data):
    """The second is refused while the first one lives, and takes over when it has been silent for
    a minute; who loses is not requeued."""
    run = TrainerRun(emulated, tmp_path, data, steps=3000, checkpoint__every_steps=5)
    (first,) = run.submit("--nodes", "1", "--time", "30")
    run.train()
    script = str(run.run / "submit/001.sbatch")
    second = emulated.ask("sbatch", "--parsable", script)
    emulated.wait_state(second, "FAILED", seconds=200)
    assert "ExitCode=2:0" in emulated.ask("scontrol", "--oneliner", "show", "job", second)
    assert emulated.state(first) == "RUNNING"

    owner = json.loads((run.run / "control/owner.json").read_text(encoding="utf-8"))
    os.kill(owner["pid"], signal.SIGSTOP)
    third = emulated.ask("sbatch", "--parsable", script)
    before = run.last()
    wait_for(lambda: run.last() > before, 300, run.story)
    os.kill(owner["pid"], signal.SIGCONT)
    emulated.wait_state(first, "FAILED", seconds=120)
    assert "ExitCode=3:0" in emulated.ask("scontrol", "--oneliner", "show", "job", first)
    run.slurm("stop", str(run.run))
    emulated.wait_state(third, "COMPLETED")
    assert [line["step"] for line in run.lines()] == list(range(1, run.last() + 1))
