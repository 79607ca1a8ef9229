"""The table of decisions: what follows when a try has ended."""

from dataclasses import replace

import pytest

from slurm.decide import Outcome, decide
from slurm.run_files import fruitless, suspects

DIED = Outcome(
    state="failed", reason="rank 1: killed", code=1, steps=(10, 20), fruitless=0, restarts_left=2
)
CASES = [
    # what happened, action, exit code of the job
    ({"state": "finished", "code": 0}, "done", 0),
    ({"state": "finished", "code": 143}, "done", 0),  # launchers hide codes
    ({"state": "finished", "code": 0, "leaving": "time"}, "done", 0),
    ({"state": "stopped", "code": 0, "stop_asked": True}, "stop", 0),
    ({"state": "stopped", "code": 0, "stop_asked": True, "leaving": "time"}, "stop", 0),
    ({"state": "failed", "stop_asked": True}, "stop", 1),
    ({"code": 3, "state": "running"}, "leave", 3),
    ({"code": 2, "state": ""}, "give up", 2),  # the rest of a chain would be refused one by one
    ({}, "restart", 75),
    ({"code": -9, "state": "running"}, "restart", 75),  # killed without a word
    ({"code": 0, "state": "running"}, "restart", 75),  # deepspeed says 0 for a killed launch.py
    ({"restarts_left": 0}, "requeue", 75),
    ({"leaving": "time limit", "state": "stopped", "code": 0}, "requeue", 75),
    ({"leaving": "preempted"}, "requeue", 75),  # no time to restart here
    ({"state": "stopped", "code": 0}, "restart", 75),  # a signal that nobody here sent
    ({"code": 12}, "requeue", 12),
    ({"steps": (20, 20), "fruitless": 0}, "restart", 75),
    ({"steps": (20, 20), "fruitless": 1}, "restart", 75),
    ({"steps": (20, 20), "fruitless": 2}, "give up", 13),
    ({"steps": (20, 20), "fruitless": 2, "leaving": "time"}, "give up", 13),
    ({"steps": (20, 21), "fruitless": 2}, "restart", 75),  # one step is progress
    ({"steps": (20, 21), "fruitless": 9, "restarts_left": 0}, "requeue", 75),
]


@pytest.mark.parametrize(("changes", "action", "code"), CASES)
def test_table(changes, action, code):
    found = decide(replace(DIED, **changes))
    assert (found.action, found.code) == (action, code)
    assert found.why


def test_the_reason_to_give_up_is_the_last_one():
    found = decide(replace(DIED, steps=(5, 5), fruitless=2, reason="rank 3: no GPU"))
    assert found.why == "3 tries in a row made no new step; the last one: rank 3: no GPU"


def test_only_tries_without_a_step_count():
    """A long chain of short jobs that all get on goes on for ever."""
    tries = [{"steps": [n, n + 1]} for n in range(40)]
    assert fruitless(tries) == 0
    assert fruitless([*tries, {"steps": [40, 40]}, {"steps": [40, 40]}]) == 2
    assert fruitless([{"steps": [0, 0]}, {"steps": [0, 3]}]) == 0


def test_suspects():
    """Unfit once, or named twice."""
    tries = [{"suspects": ["a", "b"]}, {"suspects": ["b"]}, {"unfit": ["c"]}]
    assert suspects(tries) == ["b", "c"]
