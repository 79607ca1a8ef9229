"""What a supervisor does when clocks, disks, other jobs and SLURM's controller misbehave."""

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import cluster, follow, logs, owner
from slurm import supervise as module
from slurm.one_try import OneTry
from slurm.run_files import Ledger, control, read_attempts
from slurm.supervise import Supervisor
from slurm.supervise_options import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """SLURM's commands as shell lines; what was called is kept."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    calls = tmp_path / "calls"

    def write(**bodies: str) -> Path:
        for name, body in bodies.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{body}\n')
            path.chmod(0o755)
        return calls

    return write


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "run"
    (folder / "control").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    # What lies below this process are the servers of other tests; and no orphans come to it.
    monkeypatch.setattr("slurm.one_try.end_descendants", lambda *_: [])
    monkeypatch.setattr(module, "adopt_orphans", lambda: None)
    return folder


def supervisor(run: Path, *options: str) -> Supervisor:
    return Supervisor(run, parse([str(run), *options, "--", "sh", "-c", "exit 2"]))


OWNER = {"job": "SLURM_JOB_ID=7", "host": "n9", "token": "x"}


@pytest.mark.parametrize(
    ("squeue", "over"),
    [
        ("exit 0", True),
        ("echo PENDING", True),
        ("echo Invalid job id specified >&2; exit 1", True),
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_a_dead_owners_job_is_succeeded_at_once(run, commands, monkeypatch, squeue, over):
    """And one that may live is waited for: a controller that is away says nothing."""
    commands(squeue=squeue)
    monkeypatch.setattr(owner, "_GRACE_S", 1 - owner.SILENT_S)
    control(run, "owner.json").write_text(json.dumps(OWNER))
    control(run, "heartbeat").touch()
    started = time.monotonic()
    refused = owner.wait(run, "SLURM_JOB_ID=8", str, print)
    assert time.monotonic() - started < 10
    left = json.loads(control(run, "owner.json").read_text())
    assert (refused == "", "left" in left) == (over, over)
    assert over or "at work in SLURM_JOB_ID=7 on n9" in refused


def test_a_signal_while_the_owner_is_waited_for_is_followed_by_the_next_job(run, commands):
    commands(squeue="echo RUNNING")
    control(run, "owner.json").write_text(json.dumps(OWNER))
    control(run, "heartbeat").touch()
    this = supervisor(run)
    this._asked(module.signal.SIGUSR1, None)
    assert this._before().action == "requeue"


def test_a_refused_run_ends_its_chain_with_the_reason(run, commands, capsys):
    calls = commands(squeue='case "$*" in *PENDING*) echo 9; echo 10;; esac', scancel="", sinfo="")
    this = supervisor(run, "--chain", "pretrain-r-1")
    assert this.supervise() == 2
    assert "scancel 9 10\n" in calls.read_text()
    (only,) = read_attempts(run)
    assert only["decision"] == "give up" and "the trainer refused to start" in only["why"]
    assert "exit code 2" in capsys.readouterr().err


def test_a_controller_that_is_away_is_waited_for(commands):
    """A requeue that fails would be the end of the run without a word; one that is refused is."""
    calls = commands(
        squeue="echo RUNNING",
        scontrol=(
            '[ -e "$0.2" ] && exit 0; [ -e "$0.1" ] && touch "$0.2"; touch "$0.1"\n'
            'echo "Unable to contact slurm controller" >&2; exit 1'
        ),
    )
    said: list[str] = []
    follow.again("8", None, ["a"], [], said.append, pause_s=0.01)
    assert calls.read_text().count("scontrol requeue 8") == 3 and "done" in said[-1]
    calls.unlink()
    commands(scontrol="echo Requested operation is presently disabled >&2; exit 1")
    follow.again("8", None, ["a"], [], said.append, pause_s=0.01)
    assert calls.read_text().count("scontrol") == 1 and "submit the run again" in said[-1]
    module.signal.signal(module.signal.SIGTERM, module.signal.SIG_DFL)


def test_a_torn_line_costs_no_other(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.note(steps=[0, 1])
    with open(tmp_path / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write('{"attempt": 2, "ste')  # the disk was full
    ledger.note(steps=[1, 2])
    assert [a["steps"] for a in read_attempts(tmp_path)] == [[0, 1], [1, 2]]
    (tmp_path / "attempts.jsonl").unlink()  # a file server that has forgotten it for a moment
    assert len(ledger.tries()) == 2


def one_try(run: Path, silent_minutes: float, leaving="") -> OneTry:
    options = argparse.Namespace(silent_minutes=silent_minutes, leave_s=1.0, launcher=None)
    return OneTry(run, options, ["a"], "", 1, lambda text: None, lambda: leaving)


@pytest.mark.parametrize("jump_s", [-7200, 7200])
def test_clocks_that_jump_end_no_run(run, monkeypatch, jump_s):
    """A heartbeat counts when it changes, whatever the time is here or on the file server."""
    control(run, "heartbeat").touch()
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + jump_s)
    beat = f"for n in 1 2 3 4 5 6 7 8; do touch {control(run, 'heartbeat')}; sleep 0.1; done"
    this = one_try(run, 0.5 / 60)
    this._watch(child := subprocess.Popen(["sh", "-c", beat]))
    assert (child.returncode, this.reason) == (0, "")
    this._watch(subprocess.Popen(["sleep", "30"]))
    assert this.reason.startswith("no sign of life for")


def test_the_wish_to_stop_is_repeated_until_the_run_has_ended(run):
    """The trainer drops requests that are older than its start."""
    path = control(run, "stop.auto")
    waits = f"while [ ! -e {path} ]; do sleep 0.05; done; rm {path}; "
    this = one_try(run, 1.0, leaving="the time limit is near")
    this._watch(child := subprocess.Popen(["sh", "-c", waits * 2]))
    assert child.returncode == 0


def test_silence_is_told_by_the_file_systems_clock(run, monkeypatch):
    control(run, "heartbeat").touch()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert owner.silence(run) < 5.0 and not list((run / "control").glob(".clock*"))


def test_a_command_that_hangs_is_given_up(commands, monkeypatch):
    commands(squeue="exec sleep 30")
    monkeypatch.setattr(cluster, "_PATIENCE_S", 0.2)
    assert cluster.ask("squeue") == "" and not cluster.is_over("7")
    with pytest.raises(cluster.SlurmError, match="gave no answer"):
        cluster.ask("squeue", check=True)


@pytest.mark.parametrize(
    "path",
    sorted(
        path for path in (ROOT / "slurm").glob("*.py") if "__name__ ==" in path.read_text("utf-8")
    ),
    ids=lambda path: path.stem,
)
def test_every_help_works(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    name = "slurm" if path.stem == "__main__" else f"slurm.{path.stem}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    assert not left.value.code and len("".join(capsys.readouterr())) > 100


def test_logs_of_a_job_and_of_a_rank(tmp_path, monkeypatch, capsys):
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda file, words: called.append(words))
    folder = tmp_path / "logs"
    folder.mkdir()
    for number, name in enumerate(("rank_00000.log", "rank_00003.log", "job-7.log", "job-12.log")):
        (folder / name).write_text("x")
        os.utime(folder / name, (number, number))
    assert logs.main([str(tmp_path)]) is None or called
    assert logs.main([str(tmp_path), "-f", "--rank", "3", "-n", "9"]) is None or called
    assert called == [
        ["tail", "--lines=50", str(folder / "job-12.log")],
        ["tail", "--lines=9", "--follow=name", str(folder / "rank_00003.log")],
    ]
    assert logs.main([str(tmp_path), "--rank", "4"]) == 1
    assert "there are rank_00000.log to rank_00003.log" in capsys.readouterr().err


def test_logs_are_followed_from_job_to_job(tmp_path, monkeypatch, capsys):
    """Of a chain; nothing is lost where one ends, and an old log that is touched is not read."""
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "job-6.log").write_text("old\n")
    os.utime(folder / "job-6.log", (1, 1))
    (folder / "job-7.log").write_text("a\nb\nc\n")

    def act(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        with open(
            folder / ("job-7.log", "job-12.log", "job-12.log")[number], "a", encoding="utf-8"
        ) as log:
            log.write(f"line {number}\n")
        if number == 1:
            with open(folder / "job-7.log", "a", encoding="utf-8") as log:
                log.write("its last words\n")
            os.utime(folder / "job-12.log", (4e9, 4e9))
        os.utime(folder / "job-6.log", (3e9, 3e9))

    moments = iter(range(4))
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: act(next(moments)))
    assert logs.main([str(tmp_path), "-f", "-n", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "b\nc\nline 0\nits last words\nline 1\nline 2\n"
    assert [line.split("/")[-1] for line in said.err.splitlines()] == [
        "job-7.log <==",
        "job-12.log <==",
    ]
