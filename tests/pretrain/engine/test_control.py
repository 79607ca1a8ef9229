"""Control files and signals: requests are seen, one owner, the first failure is kept."""

import json
import os
import signal

import pytest

from pretrain.engine.control import ControlFolder, OwnershipLost, StopSignals


@pytest.fixture
def control(tmp_path):
    folder = ControlFolder(tmp_path)
    folder.take_ownership()
    return folder


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


def test_an_old_request_does_not_stop_the_next_start(control, tmp_path):
    (control.path / "stop").touch()
    ControlFolder(tmp_path).take_ownership()
    assert control.stop_requested() is None


def test_ownership_passes_to_the_last_start(control, tmp_path):
    control.check_ownership()
    successor = ControlFolder(tmp_path)
    successor.take_ownership()
    successor.check_ownership()
    with pytest.raises(OwnershipLost, match=f"process {os.getpid()} on "):
        control.check_ownership()
    (control.path / "owner.json").write_text("{")
    with pytest.raises(OwnershipLost, match="cannot read"):
        successor.check_ownership()


def test_status_and_heartbeat(control):
    control.status("running", 7)
    status = json.loads((control.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("running", 7)
    control.beat()
    assert (control.path / "heartbeat").exists()


def test_the_first_failure_names_the_cause(control):
    control.status("running", 7)
    control.failed("rank 3: shard damaged")
    control.failed("rank 0: connection closed by peer")
    status = json.loads((control.path / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 7
    assert status["reason"] == "rank 3: shard damaged"


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
