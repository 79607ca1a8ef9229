"""A rank that is slow is named; one that stops, or never comes, ends the run in time, by name."""

import gzip
import json
import signal
import socket
import time

import pytest

from tests.distributed.launch import kill_ranks, start_ranks, tails
from tests.distributed.test_resume import metrics, steps_logged
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

LIMITS = {"start_minutes": 1.0, "step_minutes": 0.1, "save_minutes": 0.5}
OVERHEAD_S = 24.0  # comparing reports, writing stacks, and a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def started(data, folder, limits=LIMITS, module="pretrain.train"):
    recipe = tiny_recipe(
        data, folder / "run", steps=100_000, failure=limits, checkpoint={"every_steps": 10**6}
    )
    path = write_recipe(folder / "recipe.yaml", recipe)
    return folder / "run", start_ranks(module, [path], 2, folder)


def status_of(run) -> dict:
    return json.loads((run / "control/status.json").read_text())


def check_trace(run, until) -> None:
    """One file shows both ranks' operators and steps beside their loader workers' work."""
    while (run / "control/profile").exists() and time.monotonic() < until:
        time.sleep(0.05)
    (path,) = (run / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = {}
    for event in events:
        if event["ph"] == "X":
            title = titles[event["pid"]].partition(" worker")[0]
            found.setdefault(title, []).append(event)
    for rank in (0, 1):
        (own,) = (pid for pid, name in titles.items() if name == f"rank {rank}: python")
        assert own is not None
        operators = found[f"rank {rank}: python"]
        assert {"aten::linear", "aten::layer_norm"} <= {e["name"] for e in operators}
        steps = found[f"rank {rank}: steps"]
        assert len(steps) == 2 and steps[0]["name"].startswith("step ")
        begin = min(e["ts"] for e in steps) - 1e6
        end = max(e["ts"] + e["dur"] for e in steps) + 1e6
        assert all(begin < e["ts"] < end for e in operators if e["cat"] == "cpu_op")
        work = found[f"rank {rank}: loader"]
        assert {"decode", "collate"} <= {e["name"] for e in work}
        assert all(begin < e["ts"] < end for e in work)
    assert "ui.perfetto.dev" in (run / "logs/rank_00000.log").read_text()


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_rank_that_is_slow_and_then_stopped(data, tmp_path, stopped):
    module = "tests.distributed.slow_worker" if stopped == 1 else "pretrain.train"
    run, ranks = started(data, tmp_path, module=module)
    try:
        until = time.monotonic() + 120
        while steps_logged(run) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        if stopped == 1:
            assert "slow_rank" not in status_of(run)
            (run / "control/profile").write_text("ranks=0,1 steps=2")
            check_trace(run, until)
            while "slow_rank" not in status_of(run) and time.monotonic() < until:
                time.sleep(0.05)
            named = status_of(run)["slow_rank"]
            assert (named["rank"], named["host"]) == (1, socket.gethostname())
            assert named["share"] > 0.5 and named["factor"] > 1.2
            assert [line["slowest_rank"] for line in metrics(run)[-10:]].count(1) > 5
        else:
            time.sleep(4)  # both have reported
        ranks[stopped].send_signal(signal.SIGSTOP)
        since, other = time.monotonic(), 1 - stopped
        assert ranks[other].wait(timeout=90) == 1, tails(tmp_path)
        assert time.monotonic() - since < 60 * LIMITS["step_minutes"] + OVERHEAD_S
    finally:
        kill_ranks(ranks)
    status = status_of(run)
    assert status["state"] == "failed" and status["phase"] == "step"
    assert stopped == 0 or "slow_rank" in status
    # Rank 0 serves the store in which the ranks report.
    named = "rank 1 does not report any more" if stopped else "rank 0 or its node hangs"
    assert named in status["reason"]
    stacks = (run / f"logs/stacks_rank_{other:05d}.txt").read_text()
    assert "accumulate" in stacks or "all_reduce" in stacks


def test_a_rank_that_never_comes(data, tmp_path):
    run, ranks = started(data, tmp_path, LIMITS | {"start_minutes": 0.15})
    ranks[1].send_signal(signal.SIGKILL)
    try:
        assert ranks[0].wait(timeout=60) == 1, tails(tmp_path)
    finally:
        kill_ranks(ranks)
    status = status_of(run)
    assert (status["state"], status["phase"]) == ("failed", "start")
    assert "rank 1 has never reported" in status["reason"]
