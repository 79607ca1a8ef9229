"""Who may write into a run directory: refusals, take-overs, and what the loser may not do."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from data_pipeline.loader.faults import FaultFile
from data_pipeline.loader.stream import Fault
from pretrain.engine.control.control import ControlFolder
from pretrain.engine.control.failures import FAILED, LOST, end_failed
from pretrain.engine.control.ownership import (
    SILENT_S,
    OccupiedError,
    OwnershipLost,
    claim,
    claimed_by_this_launch,
    refuse_if_occupied,
)
from pretrain.engine.report.metrics_log import LoggingSettings, MetricsLog

JOB, OTHER_JOB = {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def seen(run, seconds_ago: float) -> None:
    """Let the owner's last sign of life be so old."""
    then = time.time() - seconds_ago
    for name in ("owner.json", "heartbeat"):
        (run / "control" / name).touch()
        os.utime(run / "control" / name, (then, then))


def rewrite_owner(run, **changes) -> None:
    path = run / "control/owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def elsewhere(run) -> None:
    """Let the owner be a process of another machine, of which nothing but its files is seen."""
    rewrite_owner(run, host="gpu07", pid=123, machine="another")


def test_a_second_start_is_refused_while_the_owner_lives(run):
    claim(run, JOB)
    elsewhere(run)
    seen(run, 20)
    with pytest.raises(OccupiedError) as refused:
        claim(run, OTHER_JOB)
    for part in (
        str(run),
        "process 123 on gpu07",
        "job SLURM_JOB_ID=7",
        " 2",
        " s ago",
        "--take-over",
        f"touch {run / 'control/stop'}",
    ):
        assert part in str(refused.value)
    with pytest.raises(OccupiedError):  # a rank that does not claim
        refuse_if_occupied(run, {"MASTER_ADDR": "h", "MASTER_PORT": "2"} | OTHER_JOB, 0.0)
    with pytest.raises(OccupiedError):
        claim(run, {})


@pytest.mark.parametrize("why", ["silent", "same job", "insists", "left", "owner.json is damaged"])
def test_a_second_start_that_is_let_through(run, why):
    first = claim(run, JOB)
    elsewhere(run)
    if why == "silent":
        seen(run, SILENT_S + 1)
    elif why == "left":
        first.leave()
    elif why == "owner.json is damaged":
        (run / "control/owner.json").write_text("[")
    second = claim(run, JOB if why == "same job" else OTHER_JOB, take_over=why == "insists")
    assert second.holds() and not first.holds() and first.lost
    with pytest.raises(OwnershipLost, match=f"process {os.getpid()} on .* has taken over"):
        first.require()


def test_a_dead_owner_of_this_machine_is_succeeded_at_once(run):
    code = (
        "import sys; from pretrain.engine.control.ownership import claim;"
        "claim(sys.argv[1], {}); print('claimed', flush=True); input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    owner.stdout.readline()
    with pytest.raises(OccupiedError, match=f"process {owner.pid} "):
        claim(run, {})
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    assert claim(run, {}).holds()  # a zombie, as launchers leave them for a while
    owner.communicate()


def test_torchrun_starts_its_ranks_anew(run):
    """The name of a run alone says nothing: people use it twice."""
    agent = {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    claim(run, agent | {"TORCHELASTIC_RESTART_COUNT": "0"})
    elsewhere(run)
    with pytest.raises(OccupiedError):
        claim(run, agent | {"MASTER_PORT": "2", "TORCHELASTIC_RESTART_COUNT": "0"})
    assert claim(run, agent | {"TORCHELASTIC_RESTART_COUNT": "1"}).holds()


def test_another_node_waits_for_what_rank_0_knows(run):
    """That the owner, a process of its node, is dead: seen from elsewhere it is just silent."""
    mine = {"MASTER_ADDR": "h", "MASTER_PORT": "2"}
    claim(run, {})
    elsewhere(run)
    late = threading.Timer(0.5, claim, (run, mine, True))
    late.start()
    refuse_if_occupied(run, mine)
    late.join()
    with pytest.raises(OccupiedError):
        refuse_if_occupied(run, mine | {"MASTER_PORT": "3"}, 0.5)


AGENT = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "first, now, age, same",
    [
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, 60, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, 60, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "0"}, 60, False),
        # Refused at first, and started anew for that: the run is not this launch's.
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, -60, False),
        ({"MASTER_PORT": "7"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, 60, False),
        (
            {"TORCHELASTIC_RUN_ID": "a"},
            {"TORCHELASTIC_RUN_ID": "b", "TORCHELASTIC_RESTART_COUNT": "1"},
            60,
            False,
        ),
        (
            {"TORCHELASTIC_RUN_ID": "a"},
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2", "MASTER_PORT": "9"},
            60,
            True,
        ),
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1"}, 0, True),
        (JOB, JOB, 60, False),
        (JOB, OTHER_JOB | {"SLURM_RESTART_COUNT": "1"}, 60, False),
    ],
)
def test_a_launcher_that_repeats_a_start_means_its_own_run(run, first, now, age, same):
    claim(run, AGENT | first)
    assert claimed_by_this_launch(run, AGENT | now, age) == same


def test_an_unreadable_claim_is_no_claim_once_it_stays_so(run, monkeypatch):
    """A file server may fail for a moment."""
    first = claim(run, {})
    content = (run / "control/owner.json").read_text()
    (run / "control/owner.json").unlink()
    pauses = []

    def heal(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            (run / "control/owner.json").write_text(content)

    monkeypatch.setattr(time, "sleep", heal)
    assert first.holds() and len(pauses) == 2
    (run / "control/owner.json").write_text("{")
    with pytest.raises(OwnershipLost, match="cannot read"):
        first.require()


def snapshot(run) -> dict[str, bytes]:
    """All files of a run but the log files of ranks."""
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.parent.name != "logs"
    }


def test_the_loser_writes_nothing_that_others_read(run, tmp_path):
    """At every door: status, heartbeat, requests, metrics, TensorBoard, faults, failure notes."""
    first = claim(run, {})
    control = ControlFolder(run, first)
    settings = LoggingSettings(tensorboard=True)
    fault = Fault(task="t", position=1, attempt=0, row=1, shard="s", key="k", reason="r")
    with (
        MetricsLog(run, 0, 0, 10, settings, may_write=first.holds) as log,
        FaultFile(run / "faults/rank_00000.jsonl", may_write=first.holds) as faults,
    ):
        log.log(1, "t", {"loss": 1.0})
        faults.write(fault, "replaced")
        faults.flush()
        control.status("running", 1)
        control.beat()
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        assert len((run / "faults/rank_00000.jsonl").read_text().splitlines()) == 1
        claim(run, {}, take_over=True)
        (run / "control/save").touch()
        before, beats = snapshot(run), (run / "control/heartbeat").stat().st_mtime_ns
        log.log(2, "t", {"loss": 1.0})
        faults.write(fault, "replaced")
        faults.flush()
        control.save_done()
        control.status("finished", 2)
        control._last_beat = 0.0
        control.beat()
        first.leave()
        assert end_failed(run, 0, RuntimeError("a peer has left"), first) == LOST
    assert snapshot(run) == before
    assert (run / "control/heartbeat").stat().st_mtime_ns == beats
    (line,) = (run / "logs/rank_00000.log").read_text().splitlines()
    assert "has taken over this run" in line
    with MetricsLog(run, 0, 0, 10, settings, may_write=first.holds):  # a start that slept until now
        assert snapshot(run) == before


def test_of_what_ends_all_ranks_alike_one_speaks(run, capsys):
    """Every other reason is told, and each rank's stack is on file."""
    first = claim(run, {})
    ControlFolder(run, first).begin()
    alike = RuntimeError("rank 1: no labels")
    for rank, error in enumerate([alike, alike, RuntimeError("a peer has left"), alike]):
        assert end_failed(run, rank, error, first) == FAILED
    assert capsys.readouterr().err.splitlines() == [
        "rank 0: RuntimeError: rank 1: no labels",
        "rank 2: RuntimeError: a peer has left",
    ]
    assert len(list(run.glob("control/failure_rank_*.json"))) == 4
    assert not list(run.glob("control/*.lock"))


def test_a_rank_that_fails_before_it_heard_of_the_claim(run):
    """It may note why, if the claim is that of its own launch."""
    launch = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    claim(run, launch)
    os.environ |= launch
    try:
        assert end_failed(run, 1, RuntimeError("no GPU"), None) == FAILED
        status = json.loads((run / "control/status.json").read_text())
        assert (status["state"], status["reason"]) == ("failed", "rank 1: RuntimeError: no GPU")
        claim(run, {"MASTER_ADDR": "h", "MASTER_PORT": "2"})
        before = snapshot(run)
        assert end_failed(run, 1, RuntimeError("no GPU"), None) == LOST
        assert snapshot(run) == before
    finally:
        for name in launch:
            del os.environ[name]


def test_of_two_starts_at_the_same_moment_one_is_refused(run):
    code = (
        "import sys; from pretrain.engine.control.ownership import OccupiedError, claim\n"
        "try: claim(sys.argv[1], {}); print('mine', flush=True)\n"
        "except OccupiedError: print('refused', flush=True)\n"
        "input()"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = sorted(start.stdout.readline().strip() for start in starts)
    for start in starts:
        start.communicate("\n")
    assert said == ["mine", "refused", "refused"]
