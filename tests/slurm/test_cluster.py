"""Generated scripts on a real SLURM with four emulated nodes; a toy run is the payload."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from slurm.cluster import job_name
from slurm.script import Job, render
from slurm.site import Site
from tests.slurm.conftest import ROOT, attempts, dev_cluster, rank, steps, wait_for

pytestmark = pytest.mark.slurm
SITE = Site(
    gpus_per_node=0,
    ranks_per_node=2,
    signal_lead_s=60,
    python=sys.executable,
    memory=None,
    silent_minutes=0.15,
)
EIGHT = "0,1,2,3,4,5,6,7"
"""CUDA_VISIBLE_DEVICES of each rank: all that its node has."""


@pytest.fixture(autouse=True)
def empty_queue(emulated):
    """What a failed test leaves behind is not the next one's."""
    yield
    emulated.ask("scancel", "--user=root")
    wait_for(lambda: not emulated.ask("squeue", "--noheader"))


def write_script(run: Path, *toy: str, site: Site = SITE, **changes) -> str:
    """The script that a run gets, with the toy in place of the trainer."""
    (run / "logs").mkdir(parents=True)
    (run / "submit").mkdir()
    fields = {
        "name": job_name(run),
        "run": run,
        "nodes": "2",
        "time": "10",
        "launcher": "srun",
        "train": ["tests.slurm.toy_trainer", str(run), *toy],
        "requeue": True,
        "chain": False,
        "code": ROOT,
    }
    path = run / "submit/001.sbatch"
    path.write_text(render(Job(**fields | changes), site, (22, 5)), encoding="utf-8")
    return str(path)


def submit(emulated, script: str, *options: str) -> str:
    return emulated.ask("sbatch", "--parsable", *options, script)


def make_steps(run: Path, count: int = 3, seconds: float = 90) -> None:
    """Wait until so many more steps are made."""
    before = len(steps(run))
    wait_for(lambda: len(steps(run)) >= before + count, seconds, lambda: story(run))


def story(run: Path) -> str:
    """What a run says, for a test that fails."""
    logs = "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(run.glob("logs/*")))
    return f"{attempts(run)}\n{logs}"


def steps_are_whole(run: Path) -> None:
    """No step is missing, and those done twice came after the last checkpoint."""
    made = steps(run)
    assert sorted(set(made)) == list(range(1, max(made) + 1))
    assert all(after <= before + 1 for before, after in itertools.pairwise(made))


def test_a_life(emulated, tmp_path):
    """Rank killed, node lost, preempted, time limit, stopped by a person: no step is lost."""
    run = tmp_path / "run"
    job = submit(emulated, write_script(run, "--steps", "100000"))
    make_steps(run)
    said = emulated.ask(sys.executable, "-m", "slurm", "drill", str(run), "--kill-rank")
    assert "was followed by: restart" in said and "steps are done again" in said
    assert attempts(run)[0]["decision"] == "restart"  # on the same nodes, in the same job
    assert emulated.ask("squeue", "-h", "-o", "%i %T") == f"{job} RUNNING"

    lost = rank(run, 2)["host"]
    emulated.do("fail-node", lost)
    wait_for(lambda: rank(run, 2)["host"] != lost, 60, lambda: story(run))
    make_steps(run)
    emulated.do("start-node", lost)

    said = emulated.ask(sys.executable, "-m", "slurm", "drill", str(run), "--preempt")
    assert "was followed by: requeue" in said and ": 0 steps are done again" in said
    first = emulated.ask(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N4",
        "--exclusive",
        "--wrap",
        "sleep 1",
        "-o",
        "/dev/null",
    )
    emulated.wait_state(first, "COMPLETED")
    make_steps(run)
    emulated.ask("scancel", "--batch", "--signal=USR1", job)  # what the time limit's lead sends
    emulated.wait_state(job, "PENDING")
    make_steps(run)

    emulated.ask(sys.executable, "-m", "slurm", "stop", str(run))
    emulated.wait_state(job, "COMPLETED")
    steps_are_whole(run)
    assert attempts(run)[-1]["decision"] == "stop"
    assert "SIGUSR1" in attempts(run)[-2]["leaving"] and attempts(run)[-2]["state"] == "stopped"
    assert len(attempts(run)) == 6, story(run)  # that of the lost node too
    assert json.loads((run / "control/status.json").read_text())["state"] == "stopped"
    for number in range(4):
        assert not psutil.pid_exists(rank(run, number)["pid"])


def end_of(emulated, job: str, run: Path, *states: str, seconds: float = 90) -> None:
    try:
        emulated.wait_state(job, *states, seconds=seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{story(run)}") from None


@pytest.mark.parametrize("phase", ["start", "step"])
def test_a_node_that_reboots_without_a_word(emulated, tmp_path, phase):
    """SLURM leaves the job RUNNING, with a step that holds the node; the run starts beside it."""
    run = tmp_path / "run"
    job = submit(emulated, write_script(run, "--steps", "100000", "--start-s", "3"))
    if phase == "start":
        wait_for(lambda: len(list(run.glob("control/pids/rank_*"))) == 4, 60, lambda: story(run))
        assert not (run / "control/heartbeat").exists()
    else:
        make_steps(run)
    host = rank(run, 2)["host"]
    assert host != rank(run, 0)["host"]  # the batch node is the first one
    emulated.do("kill-node", host)
    emulated.do("start-node", host)
    wait_for(lambda: attempts(run), 90, lambda: story(run))
    make_steps(run)
    assert attempts(run)[0]["decision"] == "restart"
    # It leaves no process of the run.
    emulated.ask(sys.executable, "-m", "slurm", "cancel", str(run), "--wait", "60")
    assert emulated.state(job) == "CANCELLED"  # and the supervisor does not bring it back
    steps_are_whole(run)
    wait_for(lambda: not any(psutil.pid_exists(rank(run, n)["pid"]) for n in range(4)), 30)


def test_the_last_element_of_an_array_is_requeued_alone(emulated, tmp_path):
    """Its raw number is the array's: requeueing that would start all elements again."""
    sweep = tmp_path / "sweep"
    runs = [sweep / "000", sweep / "001"]
    for run in runs:
        (run / "logs").mkdir(parents=True)
    train = ["tests.slurm.toy_trainer", f"{sweep}/$ELEMENT", "--steps", "60"]
    array = submit(emulated, write_script(sweep, elements=2, nodes="1", train=train))
    make_steps(runs[1])
    emulated.ask("scancel", "--batch", "--signal=USR1", f"{array}_1")
    for number, run in enumerate(runs):
        end_of(emulated, f"{array}_{number}", run, "COMPLETED")
        steps_are_whole(run)
    assert [a["decision"] for a in attempts(runs[0])] == ["done"]
    assert [a["decision"] for a in attempts(runs[1])] == ["requeue", "done"]
    assert "SIGUSR1" in attempts(runs[1])[0]["leaving"] and (runs[1] / "logs").is_dir()


def chain(emulated, run: Path, count: int, *toy: str) -> list[str]:
    script = write_script(run, *toy, requeue=False, chain=True)
    return [submit(emulated, script) for _ in range(count)]


def test_a_chain_goes_on_after_a_time_limit_and_is_over_when_the_run_is(emulated, tmp_path):
    run = tmp_path / "run"
    jobs = chain(emulated, run, 3, "--steps", "60")
    make_steps(run)
    emulated.ask("scancel", "--batch", "--signal=USR1", jobs[0])
    end_of(emulated, jobs[0], run, "FAILED")  # only the end of a run is a success
    for job in jobs[1:]:
        end_of(emulated, job, run, "COMPLETED")
    assert [a["decision"] for a in attempts(run)] == ["requeue", "done"]  # the third starts nothing
    assert [a["job"] for a in attempts(run)] == jobs[:2]
    steps_are_whole(run)


@pytest.mark.slow
def test_a_chain_goes_on_after_a_link_that_was_lost_with_its_node(emulated, tmp_path):
    """Nobody was left there to say what follows."""
    run = tmp_path / "run"
    jobs = chain(emulated, run, 2, "--steps", "100")
    make_steps(run)
    lost = rank(run, 0)["host"]
    emulated.do("fail-node", lost)
    end_of(emulated, jobs[0], run, "NODE_FAIL")
    end_of(emulated, jobs[1], run, "COMPLETED", seconds=200)
    emulated.do("start-node", lost)
    assert [a["decision"] for a in attempts(run)] == ["none", "done"]
    steps_are_whole(run)


def test_a_run_that_gets_nowhere_ends_its_chain(emulated, tmp_path):
    run = tmp_path / "run"
    jobs = chain(emulated, run, 3, "--fail-at", "0", "--always-fail")
    end_of(emulated, jobs[0], run, "FAILED")
    for job in jobs[1:]:
        end_of(emulated, job, run, "CANCELLED")
    assert [a["decision"] for a in attempts(run)] == ["restart", "restart", "give up"]
    assert emulated.ask("scontrol", "--oneliner", "show", "job", jobs[0]).count("ExitCode=13:0")


def test_a_bad_node_is_named_and_the_next_job_keeps_away_from_it(emulated, tmp_path):
    """nvidia-smi of one node shows GPUs too few."""
    site = replace(SITE, gpus_per_node=8, gres="gres", setup=smi(tmp_path, poor="node1"))
    run = tmp_path / "run"
    job = submit(
        emulated,
        write_script(run, "--steps", "20", site=site, script=run / "submit/001.sbatch"),
        "--nodelist=node1,node2",
    )
    end_of(emulated, job, run, "FAILED")
    wait_for(lambda: len(attempts(run)) == 2, 60, lambda: story(run))
    first, second = attempts(run)
    assert (first["unfit"], first["code"]) == (["node1"], 12)
    assert "node node1: 1 GPUs instead of 8" in first["reason"]
    assert second["decision"] == "done" and "node1" not in second["nodes"]
    assert rank(run, 0)["gpus"] == rank(run, 3)["gpus"] == EIGHT


@pytest.mark.parametrize("gres", ["gpus-per-node", "gres"])
def test_what_a_cluster_has_is_taken_and_more_is_refused_before_it_waits(emulated, tmp_path, gres):
    """However GPUs are spelled; an emulated node has eight."""
    for name, nodes, gpus in (("all", "4", 8), ("nodes", "5", 8), ("gpus", "4", 9)):
        site = replace(SITE, gpus_per_node=gpus, gres=gres)
        script = write_script(tmp_path / name, nodes=nodes, site=site)
        if name == "all":
            emulated.ask("sbatch", "--test-only", script)
            continue
        with pytest.raises(AssertionError, match=r"allocation failure|not available"):
            emulated.ask("sbatch", "--test-only", script)


@pytest.mark.slow
def test_64_nodes_of_8_ranks(tmp_path):
    """The script of a large run, all ranks of which meet at every step."""
    site = replace(SITE, ranks_per_node=8, gpus_per_node=8, silent_minutes=5, setup=smi(tmp_path))
    with dev_cluster(64) as cluster:
        run = tmp_path / "run"
        job = submit(cluster, write_script(run, "--steps", "3", nodes="64", site=site))
        end_of(cluster, job, run, "COMPLETED", seconds=400)
        assert [a["decision"] for a in attempts(run)] == ["done"] and steps(run) == [1, 2, 3]
        for number in range(512):
            assert rank(run, number)["host"] == f"node{number // 8 + 1}"
            assert rank(run, number)["gpus"] == EIGHT


def smi(folder: Path, *, poor: str = "") -> list[str]:
    """Shell lines that put an nvidia-smi of an eight-GPU node in place; node `poor` has one."""
    path = folder / "bin/nvidia-smi"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\nfor n in 1 $([ "$(hostname)" = "{poor}" ] || seq 7); do '
        "echo 80000, 81000; done\n"
    )
    path.chmod(0o755)
    return [f'export PATH="{path.parent}:$PATH"']
