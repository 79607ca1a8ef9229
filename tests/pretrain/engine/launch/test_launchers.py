"""What has started a rank: since when it runs, and that a rank notices when it is gone."""

import signal
import subprocess
import sys

import pytest

from pretrain.engine.launch import launchers as module
from pretrain.engine.launch.launchers import age_of_start


@pytest.mark.parametrize(
    "command",
    [
        "python\0/usr/bin/torchrun\0--nproc-per-node",
        "python\0-m\0torch.distributed.run\0-m",
        "python\0-u\0-m\0deepspeed.launcher.launch\0x",
        "python\0-m\0pytest\0-q",
        "bash\0",
    ],
)
def test_a_start_begins_with_its_launcher(command, monkeypatch):
    """Which takes seconds until it starts a rank, and starts it anew after a crash."""
    ages = {1: 9000.0, 10: 600.0, 20: 12.0, 30: 4.0}  # init, shell, launcher, rank
    parents = {30: 20, 20: 10, 10: 1, 1: 0}
    commands = {20: command, 10: "bash\0", 1: "init\0"}
    monkeypatch.setattr(module.os, "getpid", lambda: 30)
    monkeypatch.setattr(module, "process_age", ages.get)
    monkeypatch.setattr(module, "_parent", parents.get)
    monkeypatch.setattr(module, "_command", lambda pid: commands[pid].split("\0"))
    launched = "torch" in command or "deepspeed" in command
    assert age_of_start() == (12.0 if launched else 4.0)


RANK = """
import sys, time
from pretrain.engine.launch.launchers import Launchers
launchers = Launchers()
print("alive", launchers.gone(), flush=True)
while not launchers.gone():
    time.sleep(0.05)
print(launchers.gone(), flush=True)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[2]])
time.sleep(60)
"""


def test_a_rank_notices_that_its_launcher_is_gone(tmp_path):
    """Killed, it says nothing to the rank, which a new parent adopts."""
    script = tmp_path / "torchrun"
    script.write_text(LAUNCHER)
    with subprocess.Popen(
        [sys.executable, str(script), "x", RANK],
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout.readline() == "alive None\n"
        launcher.send_signal(signal.SIGKILL)
        assert launcher.stdout.readline() == (
            f"torchrun (process {launcher.pid}), which started this run, is gone\n"
        )


ORPHAN = """
import os, sys, time
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
from pretrain.engine.launch.launchers import Launchers
print(Launchers().gone(), flush=True)
"""
BRIEF_LAUNCHER = """
import os, subprocess, sys
marked = {**os.environ, sys.argv[2]: "0"}
subprocess.Popen([sys.executable, "-c", sys.argv[3], str(os.getpid())], env=marked)
"""


@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "CROSS_RANK", "NOTHING"])
def test_a_rank_whose_launcher_went_before_it_looked(tmp_path, mark):
    """In its first moments; whoever adopted it is not the launcher, which alone sets these."""
    script = tmp_path / "torchrun"
    script.write_text(BRIEF_LAUNCHER)
    done = subprocess.run(
        [sys.executable, str(script), "x", mark, ORPHAN], stdout=subprocess.PIPE, text=True
    )
    gone = "the launcher that started this process is gone"
    assert done.stdout == f"{None if mark == 'NOTHING' else gone}\n"


def test_a_shell_between_a_launcher_and_its_rank_is_not_missed(monkeypatch):
    monkeypatch.setenv("CROSS_RANK", "0")
    look = "from pretrain.engine.launch.launchers import Launchers as L; print(L().gone())"
    shell = ["sh", "-c", f"{sys.executable} -c '{look}'; true"]
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "None\n"
