"""Control files and signals: requests are seen, one owner, the first failure is kept."""

import json
import os
import signal
import time

import pytest

from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.ownership import claim
from pretrain.engine.launch.launchers import age_of_start


@pytest.fixture
def control(tmp_path):
    return ControlFolder(tmp_path, claim(tmp_path, {}))


def test_requests(control):
    assert control.stop_requested() is None and not control.save_requested()
    (control.path / "stop.auto").touch()
    assert control.stop_requested() == "control/stop.auto"
    (control.path / "stop").touch()
    assert control.stop_requested() == "control/stop"
    (control.path / "save").touch()
    assert control.save_requested()
    control.save_done()
    assert not control.save_requested()


@pytest.mark.parametrize("ahead_s", [0.0, 7200.0, -7200.0])
def test_only_requests_from_before_the_start_are_dropped(control, ahead_s):
    """What is asked for while the run starts is asked of this run; a file server's clock may be
    another one than this machine's."""
    names = ("stop", "stop.auto", "save")

    def written(name: str, when: float) -> None:
        (control.path / name).touch()
        os.utime(control.path / name, (when + ahead_s, when + ahead_s))

    now, before = time.time(), time.time() - age_of_start() - 1.0
    written("owner.json", now)
    for name in names:
        written(name, before)
    control.begin()
    assert control.stop_requested() is None and not control.save_requested()
    for name in names:
        written(name, now)
    control.begin()
    assert control.stop_requested() == "control/stop" and control.save_requested()


def test_status_and_heartbeat(control):
    control.status("running", 7)
    status = json.loads((control.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("running", 7)
    control.beat()
    assert (control.path / "heartbeat").exists()
    control.begin()  # of the next start, which may fail: the step is still that of the checkpoint
    status = json.loads((control.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("starting", 7)


def test_the_status_names_the_phase(control):
    control.status("running", 7)
    control.enter("step")
    with control.during("save"):
        within = json.loads((control.path / "status.json").read_text())
        assert (within["state"], within["phase"], within["step"]) == ("running", "save", 7)
    assert json.loads((control.path / "status.json").read_text())["phase"] == "step"
    control.failed("rank 0: no space left")
    assert json.loads((control.path / "status.json").read_text())["phase"] == "step"


def test_the_first_failure_names_the_cause(control):
    control.status("running", 7)
    control.failed("rank 3: shard damaged")
    control.failed("rank 0: connection closed by peer")
    status = json.loads((control.path / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 7
    assert status["reason"] == "rank 3: shard damaged"
    control.begin()  # the next start has failures of its own
    control.failed("rank 1: no GPU")
    assert json.loads((control.path / "status.json").read_text())["reason"] == "rank 1: no GPU"


def test_signals_only_set_a_flag():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        signals = StopSignals()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
