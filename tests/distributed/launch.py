"""Start a few gloo ranks of a worker module and wait for them, with a hard time limit."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher would set; one thread, so that results do not depend on the machine."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
    }


def without_ranks() -> dict[str, str]:
    """What a person's shell has, for launchers that set the rest."""
    return {
        k: v
        for k, v in rank_environment(0, 1, 0).items()
        if k
        not in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def fork_server() -> ForkServer:
    """The server of this session; it starts with the first rank."""
    return ForkServer(ROOT)


def start_ranks(module: str, arguments: list[str], world: int, log_dir: Path) -> list:
    """Start `python -m module arguments` as `world` ranks in sessions of their own.

    They are forks of a process that has imported what they need (`fork_server`), unless
    OMNIPRETRAIN_TEST_STARTS=processes asks for whole processes.
    """
    port = free_port()
    log_dir.mkdir(parents=True, exist_ok=True)
    if os.environ.get("OMNIPRETRAIN_TEST_STARTS") != "processes":
        return [
            fork_server().start(
                module,
                list(map(str, arguments)),
                rank_environment(rank, world, port),
                ROOT,
                log_dir / f"out_{rank}.txt",
            )
            for rank in range(world)
        ]
    processes = []
    for rank in range(world):
        with open(log_dir / f"out_{rank}.txt", "w", encoding="utf-8") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, arguments)],
                    cwd=ROOT,
                    env=rank_environment(rank, world, port),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


def kill_ranks(processes: list) -> None:
    """SIGKILL every rank and its loader workers."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(
    module: str, arguments: list, world: int, log_dir: Path, timeout_s: float = 300
) -> list[int]:
    """Run to the end; returns the exit codes. Output is in `log_dir` and shown on time-out."""
    processes = start_ranks(module, arguments, world, log_dir)
    try:
        return [process.wait(timeout=timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"ranks hung after {timeout_s} s\n{tails(log_dir)}") from None
    finally:
        kill_ranks(processes)


class Cells:
    """Cells that a worker module runs in one launch: the `fast` ones in every run of the tests, the
    others where they are asked for (`make test-slow`).

    The worker gets a folder and the names of cells; it writes cells.json, name -> result.
    """

    def __init__(self, module: str, world: int, cells: list, fast: list, name) -> None:
        self.module, self.world, self.name = module, world, name
        self.fast, self.others = fast, [cell for cell in cells if cell not in fast]
        self.params = [
            pytest.param(cell, id=name(cell), marks=() if cell in fast else pytest.mark.slow)
            for cell in cells
        ]
        self._done: dict[bool, tuple[Path, dict]] = {}

    def result(self, cell, tmp_path_factory) -> tuple[Path, dict]:
        """The folder of the launch that has run this cell, and what it has found of it."""
        fast = cell in self.fast
        if fast not in self._done:
            out = tmp_path_factory.mktemp("cells")
            names = [self.name(cell) for cell in (self.fast if fast else self.others)]
            codes = run_ranks(self.module, [out, *names], self.world, out, timeout_s=800)
            assert codes == [0] * self.world, tails(out)
            self._done[fast] = out, json.loads((out / "cells.json").read_text(encoding="utf-8"))
        out, results = self._done[fast]
        return out, results[self.name(cell)]


def tails(log_dir: Path, lines: int = 40) -> str:
    """The end of every rank's output."""
    parts = []
    for path in sorted(log_dir.glob("out_*.txt")):
        text = path.read_text(errors="replace", encoding="utf-8").splitlines()
        parts.append(f"--- {path.name}\n" + "\n".join(text[-lines:]))
    return "\n".join(parts)
