"""Trackers get what metrics.jsonl gets, and never fail or hold up a run."""

import json
import logging
import threading
import time
from typing import get_args

import pytest
import torch.distributed as dist
from accelerate import tracking
from accelerate.state import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.engine.report import metrics_log, trackers
from pretrain.engine.report.metrics_log import LoggingSettings, MetricsLog
from pretrain.engine.report.trackers import TrackerName, Trackers, flat, missing_packages

RECIPE = "name: tiny\noptimizer: {lr: 0.1, betas: [0.9, 0.95]}\nema: null\n"


class Recorder(tracking.GeneralTracker):
    """A tracker as accelerate wants them; `fails_in` and `hangs_in` name a method."""

    requires_logging_directory = False
    fails_in = hangs_in = None
    name = "recorder"

    def __init__(self, project):
        super().__init__()
        self.project, self.seen = project, []
        type(self).made = self

    @property
    def tracker(self):
        return self

    def _do(self, what, *values):
        if self.hangs_in == what:
            threading.Event().wait()
        if self.fails_in == what:
            raise ConnectionError("no server")
        self.seen.append((what, *values))

    @tracking.on_main_process
    def start(self):
        self._do("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self._do("config", values)

    @tracking.on_main_process
    def log(self, values, step=None):
        self._do("log", step, values)

    @tracking.on_main_process
    def finish(self):
        self._do("finish")


def log_steps(run, name: str, steps: int = 3, rank: int = 0) -> None:
    settings = LoggingSettings(tensorboard=False).model_copy(update={"trackers": [name]})
    with MetricsLog(run, rank, 0, steps, settings, recipe=RECIPE) as log:
        for step in range(1, steps + 1):
            values = {"loss": 1.0 / step, "accuracy": None, "norm": float("inf")}
            log.log(step, "caption", values)


@pytest.fixture
def recorder(monkeypatch, caplog):
    """Registered with accelerate, and taken for an installed package."""
    kind = type("OfThisTest", (Recorder,), {})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", kind)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "START_S", 0.5)
    monkeypatch.setattr(metrics_log, "FINISH_S", 0.5)
    caplog.set_level(logging.INFO, "omnipretrain")
    return kind


def test_a_tracker_gets_recipe_and_numbers_and_accelerate_touches_nothing(recorder, tmp_path):
    log_steps(tmp_path, "recorder")
    made = recorder.made
    assert made.project == "tiny"
    assert [what for what, *_ in made.seen] == ["start", "config", "log", "log", "log", "finish"]
    assert made.seen[1][1] == {
        "name": "tiny",
        "optimizer.lr": 0.1,
        "optimizer.betas": "[0.9, 0.95]",
        "ema": "None",
    }
    assert made.seen[3][1:] == (2, {"train/caption/loss": 0.5, "train/caption/norm": float("inf")})
    assert PartialState._shared_state == {} and not dist.is_initialized()
    del recorder.made
    log_steps(tmp_path / "other", "recorder", rank=1)
    assert not hasattr(recorder, "made")


@pytest.mark.parametrize("how", ["fails_in", "hangs_in"])
@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_or_hangs(recorder, tmp_path, monkeypatch, how, where):
    """One warning, whole metrics, and the end of the run comes in time."""
    monkeypatch.setattr(recorder, how, where)
    if how == "hangs_in":
        monkeypatch.setattr(trackers, "_WAITING", 100)
    since = time.monotonic()
    log_steps(tmp_path, "recorder", steps=200)
    assert time.monotonic() - since < 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 201))
    said = (tmp_path / "logs/rank_00000.log").read_text()
    assert said.count("recorder gets nothing more of this run") == 1, said
    if how == "fails_in":
        assert "ConnectionError: no server" in said


def test_accelerates_own_tracker(tmp_path):
    """tensorboard, the only one whose package is here: its files hold the numbers."""
    log_steps(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "trackers/tensorboard/tiny"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/caption/loss")]
    assert found == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert PartialState._shared_state == {} and not dist.is_initialized()


def test_names():
    """Ours are accelerate's, written down since recipes are read before torch is imported."""
    assert sorted(get_args(TrackerName)) == sorted(
        name for name in tracking.LOGGER_TYPE_TO_CLASS if name != "recorder"
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    (line,) = missing_packages(["comet_ml"])
    assert "comet_ml is not installed" in line and line.endswith("pip install comet-ml")
    Trackers(["comet_ml"], None, {}).close(0.1)  # left out


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": True}) == {
        "a.b": 1,
        "a.c.d": "None",
        "e": True,
    }


def test_wandb_is_offline_without_a_network(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "omnipretrain")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert trackers._wandb_mode(tmp_path) == "offline"
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert trackers._wandb_mode(tmp_path) == "disabled"
    assert trackers._identity(tmp_path) == trackers._identity(tmp_path)
