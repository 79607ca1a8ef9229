"""Signals to ranks, launchers and loader workers at random moments of one run, and a resume each
time: nobody stays behind, and it ends bit for bit as a run that nobody disturbed."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import ROOT, free_port, kill_ranks, start_ranks, tails, without_ranks
from tests.distributed.launched_ranks import LATE
from tests.distributed.test_resume import EXACT, assert_same_run, finish, metrics, steps_logged
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

KILL, TERM, USR1, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
MOMENTS = ("start", "step", "save")
KILLS = list(itertools.product(MOMENTS, ("rank", "launcher", "worker"), [KILL]))
FEW = [*KILLS[3:6], ("start", "launcher", KILL), ("save", "rank", KILL), ("save", "worker", KILL)]
STOPS = list(itertools.product(MOMENTS, ("rank", "all"), (TERM, USR1, INT)))
ENDLESS = {"steps": 10**6, "schedule": {"kind": "constant", "warmup_steps": 3}}
"""Its learning rates do not depend on where it ends."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def status(run: Path) -> dict:
    return json.loads((run / "control/status.json").read_text())


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def hears_sigterm(pid: int) -> bool:
    """Whether a process has its own way to take SIGTERM."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> TERM - 1 & 1)
    return False


def wait_for_all(family: list[psutil.Process], seconds: float, said) -> None:
    """Until they have ended; who has not is ended then, and it is an error."""
    try:
        _, left = psutil.wait_procs(family, timeout=seconds)
        left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"{left} stay; {said()}"
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Launch:
    """One start of the run, which is struck once."""

    def __init__(self, arguments: list[str], run: Path, logs: Path) -> None:
        self.run, self.logs, self.ranks = run, logs, []
        words = ["pretrain.train", *arguments]
        (self.process,) = start_ranks("tests.distributed.launched_ranks", words, 1, logs)

    def strike(self, draw: random.Random, moment: str, victim: str, number: int) -> int:
        """Send the signal when that moment has come and there is such a process; returns how many
        steps this start had logged."""
        begin, since, torn = steps_logged(self.run), time.monotonic(), set(self.saves())
        wait_s, wait_steps, rank = 1.2 * draw.random() ** 2, draw.randint(1, 3), draw.randint(0, 1)
        while True:
            if moment == "start":
                is_now = time.monotonic() > since + wait_s
            elif moment == "save":
                is_now = any(path not in torn for path in self.saves())  # or it was too short
                is_now = is_now or steps_logged(self.run) >= begin + 6
            else:
                is_now = steps_logged(self.run) >= begin + wait_steps
            pids = self.pids(victim, rank) if is_now else []
            if number != KILL and not all(map(hears_sigterm, self.ranks)):
                pids = []  # it would end by the signal itself
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if pids:
                return steps_logged(self.run) - begin
            assert self.process.poll() is None, tails(self.logs)
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
        above = self.ranks if victim == "all" else [self.ranks[rank]]
        below = [p.pid for one in above for p in psutil.Process(one).children(recursive=True)]
        if victim == "all":
            return [*self.ranks, *below]
        # Its forks: the loader's, and the process that reads ahead, without which a run goes on.
        return [pid for pid in below if command(pid) == command(self.ranks[rank])]

    def end(self) -> None:
        """Everybody has to notice by himself, and to leave."""
        family = []
        for pid in [self.process.pid, *self.ranks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        wait_for_all(list(set(family)), 60, lambda: tails(self.logs))
        said = tails(self.logs)
        assert self.process.wait(timeout=5) != LATE, f"a rank waits on for the other one; {said}"
        assert "Usage:" not in said and "is in use" not in said, said


def struck(data: Path, folder: Path, strikes: list[tuple], **changes) -> None:
    """A run without end is struck in each of these moments, in random order, goes on for some steps
    and ends; so does one that nobody disturbs, and both are the same."""
    run, seed = folder / "run", random.randrange(10**6)
    draw, told = random.Random(seed), []
    settings = tiny_recipe(data, run, **ENDLESS | changes)
    recipe = write_recipe(folder / "recipe.yaml", settings)
    for count, (moment, victim, number) in enumerate(draw.sample(strikes, len(strikes))):
        launch = Launch([str(recipe), "--start-or-resume"], run, folder / f"start{count}")
        try:
            made = launch.strike(draw, moment, victim, number)
            told.append((moment, victim, number.name, made))
        finally:
            launch.end()
        if number != KILL:
            assert launch.process.returncode == 0, tails(launch.logs)
            assert (status(run)["state"], status(run)["reason"]) == ("stopped", number.name)
            assert (run / f"checkpoints/step_{status(run)['step']:09d}/manifest.json").exists()
    print(f"seed {seed}: {told}")  # shown when something fails
    hit = [made > 0 for moment, *_, made in told if moment != "start"]
    assert sum(hit) >= len(hit) / 2, "most strikes came before the first step"
    end = f"steps={steps_logged(run) + 4}"
    finish(recipe, folder / "last", "--start-or-resume", end)
    settings = tiny_recipe(data, folder / "whole", **ENDLESS)
    if "deepspeed" in changes:
        settings["deepspeed"] = changes["deepspeed"]
    finish(write_recipe(folder / "whole.yaml", settings), folder / "whole_logs", end)
    assert_same_run(folder / "whole", run)


def test_killed_six_times_and_stopped_once(data, tmp_path):
    """Through a cache and with `deterministic`, neither of which the undisturbed run has."""
    cache = {"folder": str(tmp_path / "cache"), "max_gib": 0.001, "block_mib": 0.01}
    strikes = [*FEW, random.choice(STOPS)]
    struck(data, tmp_path, strikes, loader__cache=cache, deterministic=True)
    run = tmp_path / "run"
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert len(starts) > 3 and all(start["deterministic"] for start in starts)
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) > 3 and not [name for name in kept if name.endswith((".tmp", ".lock"))]
    assert any(line.get("cache_hits") for line in metrics(run))


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_fifty_times(data, tmp_path, stage, behind):
    """Nine times each. behind: checkpoints are written while training goes on, so that some strikes
    fall between a snapshot and its commit."""
    changes = {"deepspeed": f"zero{stage}", "checkpoint__asynchronous": behind}
    struck(data, tmp_path, KILLS, **changes)


@pytest.mark.slow
def test_every_stop(data, tmp_path):
    """SIGTERM, SIGUSR1 and SIGINT to one rank, or to all processes, in each phase."""
    struck(data, tmp_path, STOPS)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port=PORT", "-m"],
    "deepspeed": [
        "deepspeed.launcher.runner",
        "--num_gpus=2",
        "--master_port=PORT",
        "--module",
    ],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--num_processes=2",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=PORT",
        "-m",
    ],
}
CELLS = [(launcher, whom) for launcher in LAUNCHERS for whom in ("launcher", "all")]
CELLS += [("deepspeed", "launcher of the node")]


def launched(launcher: str, recipe: Path, out: Path) -> subprocess.Popen:
    """A real launcher, in a session of its own."""
    words = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    with open(out, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words, "pretrain.train", str(recipe), "--start-or-resume"],
            cwd=ROOT,
            env=without_ranks(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def send(number: int, whom: str, above: psutil.Process, family: list[psutil.Process]) -> None:
    """To all: as schedulers do; Ctrl-C as terminals do, to the group of what they have started."""
    if whom == "all" and number == INT:
        return os.killpg(above.pid, number)
    chosen = {"launcher": [above], "launcher of the node": family[:1], "all": [above, *family]}
    for process in chosen[whom]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "whom"), CELLS)
def test_every_signal_to_a_launcher(data, tmp_path, launcher, whom):
    """Whatever becomes of it, its ranks save and leave within half a minute."""
    run, limits = tmp_path / "run", {"step_minutes": 0.5}
    settings = tiny_recipe(data, run, steps=10**6, failure=limits, checkpoint={"every_steps": 50})
    recipe = write_recipe(tmp_path / "recipe.yaml", settings)
    for number in (KILL, TERM, USR1, INT):
        cell, before = f"{number.name} to {whom}", steps_logged(run)
        started = launched(launcher, recipe, tmp_path / "out_0.txt")
        family = []
        try:
            until = time.monotonic() + 180
            while steps_logged(run) < before + 2:
                assert time.monotonic() < until and started.poll() is None, tails(tmp_path)
                time.sleep(0.02)
            above = psutil.Process(started.pid)
            family = above.children(recursive=True)
            assert len(family) >= 4, "no loader workers"
            send(number, whom, above, family)
            wait_for_all(family, 40, lambda cell=cell: f"{cell}; {tails(tmp_path)}")
        finally:
            wait_for_all([psutil.Process(started.pid)], 40, lambda: tails(tmp_path))
            started.wait()
        found = status(run)
        if (whom, number) != ("all", KILL):
            assert found["state"] == "stopped", f"{cell}: {found}; {tails(tmp_path)}"
            assert (
                number.name in found["reason"]
                or "is gone" in found["reason"]
                or (
                    found["reason"] == "SIGTERM"  # as most launchers hand others on
                )
            ), f"{cell}: {found}"
            assert (run / f"checkpoints/step_{found['step']:09d}/manifest.json").exists()
            assert not list(run.glob("control/failure_rank_*.json")), cell
    assert_same_lines(data, tmp_path, settings, run)


def assert_same_lines(data: Path, folder: Path, settings: dict, run: Path) -> None:
    """Each step was made once, and is that of a run in one go as far as this one came."""
    lines = [line for line in metrics(run) if line["kind"] == "train"]
    straight = folder / "straight"
    recipe = write_recipe(folder / "straight.yaml", {**settings, "run_dir": str(straight)})
    ranks = start_ranks("pretrain.train", [recipe], 2, folder / "straight_logs")
    try:
        while steps_logged(straight) < len(lines):
            assert all(rank.poll() is None for rank in ranks), tails(folder / "straight_logs")
            time.sleep(0.1)
    finally:
        kill_ranks(ranks)
    whole = [line for line in metrics(straight) if line["kind"] == "train"]
    for line, other in zip(lines, whole, strict=False):
        assert line["step"] == other["step"]
        assert {k: line.get(k) for k in EXACT} == {k: other.get(k) for k in EXACT}, line["step"]
