"""kill -9 of a rank, its launcher or a loader worker, at random moments of one run, and a resume
each time: it ends bit for bit as a run that nobody disturbed."""

import contextlib
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import start_ranks, tails
from tests.distributed.launched_ranks import LATE
from tests.distributed.test_resume import assert_same_run, finish, metrics, steps_logged
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

STRIKES = list(itertools.product(("start", "step", "save"), ("rank", "launcher", "worker")))
FEW = [*STRIKES[3:6], ("start", "launcher"), ("save", "rank"), ("save", "worker")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def living(pids: list[int]) -> list[psutil.Process]:
    """Those of them that have not ended, and all below them."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found += [process, *process.children(recursive=True)]
    return found


class Launch:
    """One start of the run, which is struck once."""

    def __init__(self, arguments: list[str], run: Path, logs: Path) -> None:
        self.run, self.logs, self.ranks = run, logs, []
        words = ["pretrain.train", *arguments]
        (self.process,) = start_ranks("tests.distributed.launched_ranks", words, 1, logs)

    def strike(self, draw: random.Random, moment: str, victim: str) -> int | None:
        """SIGKILL, when that moment has come and there is such a process; returns how many steps
        this start had logged, or None if the run was over before."""
        begin, since, torn = steps_logged(self.run), time.monotonic(), set(self.saves())
        wait_s, wait_steps, rank = 1.2 * draw.random() ** 2, draw.randint(1, 3), draw.randint(0, 1)
        while True:
            if moment == "start":
                is_now = time.monotonic() > since + wait_s
            elif moment == "save":
                is_now = any(path not in torn for path in self.saves())
            else:
                is_now = steps_logged(self.run) >= begin + wait_steps
            pids = self.pids(victim, rank) if is_now else []
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                return steps_logged(self.run) - begin
            if self.process.poll() is not None:
                assert self.process.returncode == 0, tails(self.logs)
                return None
            assert time.monotonic() < since + 120, f"no {moment} with a {victim} came"
            time.sleep(0.002)

    def saves(self) -> list[Path]:
        """Checkpoints that are being written, or that an earlier strike has cut off."""
        return list(self.run.glob("checkpoints/.writing-*"))

    def pids(self, victim: str, rank: int) -> list[int]:
        """Processes of this kind; empty if there are none yet."""
        with contextlib.suppress(OSError):
            self.ranks = json.loads((self.logs / "ranks.json").read_text())
        if victim == "launcher" or not self.ranks:
            return [self.process.pid] if victim == "launcher" and self.ranks else []
        if victim == "rank":
            return [self.ranks[rank]]
        path = Path(f"/proc/{self.ranks[rank]}/task/{self.ranks[rank]}/children")
        with contextlib.suppress(OSError):
            return [int(word) for word in path.read_text("utf-8").split()]
        return []

    def end(self) -> None:
        """Everybody has to notice by himself, and to leave."""
        family = [self.process.pid, *self.ranks]
        try:
            until = time.monotonic() + 60
            while left := living(family):
                assert time.monotonic() < until, f"{left} stay; {tails(self.logs)}"
                time.sleep(0.02)
        finally:
            for process in living(family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        said = tails(self.logs)
        assert self.process.wait(timeout=5) != LATE, f"a rank waits on for the other one; {said}"
        assert "Usage:" not in said and "is in use" not in said, said


def struck(data: Path, folder: Path, strikes: list[tuple[str, str]], **changes) -> Path:
    """A run that is struck in each of these moments, in random order, and then finishes."""
    run, seed = folder / "run", random.randrange(10**6)
    draw, told = random.Random(seed), []
    recipe = write_recipe(folder / "recipe.yaml", tiny_recipe(data, run, **changes))
    for number, (moment, victim) in enumerate(draw.sample(strikes, len(strikes))):
        launch = Launch([str(recipe), "--start-or-resume"], run, folder / f"start{number}")
        try:
            told.append((moment, victim, launch.strike(draw, moment, victim)))
        finally:
            launch.end()
    print(f"seed {seed}: {told}")  # shown when something fails
    hit = [steps for _, _, steps in told if steps is not None and steps > 0]
    assert len(hit) >= len(strikes) // 2, "most strikes came before the first step or after the end"
    finish(recipe, folder / "last", "--start-or-resume")
    return run


def undisturbed(data: Path, folder: Path, **changes) -> Path:
    recipe = tiny_recipe(data, folder / "whole", **changes)
    finish(write_recipe(folder / "whole.yaml", recipe), folder / "whole_logs")
    return folder / "whole"


def test_killed_six_times(data, tmp_path):
    """Through a cache and with `deterministic`, neither of which the undisturbed run has."""
    cache = {"folder": str(tmp_path / "cache"), "max_gib": 0.001, "block_mib": 0.01}
    run = struck(data, tmp_path, FEW, loader__cache=cache, deterministic=True, steps=24)
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert len(starts) > 3 and all(start["deterministic"] for start in starts)
    assert_same_run(undisturbed(data, tmp_path, steps=24), run)
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) > 3 and not [name for name in kept if name.endswith((".tmp", ".lock"))]
    assert any(line.get("cache_hits") for line in metrics(run))


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_fifty_times(data, tmp_path, stage, behind):
    """Nine times each. behind: checkpoints are written while training goes on, so that some strikes
    fall between a snapshot and its commit."""
    changes = {"deepspeed": f"zero{stage}", "steps": 64}
    run = struck(data, tmp_path, STRIKES, checkpoint__asynchronous=behind, **changes)
    assert_same_run(undisturbed(data, tmp_path, **changes), run)
