"""Check that the installed DeepSpeed trains several tasks correctly. Two minutes, no GPU.

    python -m tools.selfcheck                 the modes that are known to need a guard
    python -m tools.selfcheck --all           the whole parity matrix
    python -m tools.selfcheck --world 4

Starts CPU processes, trains a small model under ZeRO with and without offload, one task and three
in turn, and compares every loss, gradient and final weight with plain PyTorch: with a module that
runs twice in a backward pass, with frozen parameters and with weights that must not stay gathered.
Reentrant checkpointing, which loses gradients, has to be refused. A pass is noted in
the user's cache folder; training asks for it where DeepSpeed's version is not one that the project
was checked with. Exit codes: 0 all equal, 1 not, 2 wrong usage.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from data_pipeline.console import parse_in_any_order
from data_pipeline.files import CACHE_VARIABLE

if TYPE_CHECKING:  # --help and wrong arguments do without torch
    from tools.selfcheck.parity_cells import Cell

console = Console(soft_wrap=True)
TIME_LIMIT_S = 900


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="tools.selfcheck", description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--all", action="store_true", help="every mode, not only affected ones")
    options = parse_in_any_order(parser, argv)
    if options.world < 1:
        parser.error("--world must be at least 1")
    from tools.selfcheck.parity_cells import all_cells

    os.environ["DS_ACCELERATOR"] = "cpu"  # the processes see no GPU, whatever this machine has
    cells = [c for c in all_cells() if c.precision == "fp32" and (options.all or is_affected(c))]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with console.status(f"{len(cells)} modes on {options.world} processes"):
            problem = launch(cells, options.world, Path(folder))
        if problem:
            console.print("the processes failed", style="red")
            console.print(problem, markup=False, highlight=False)  # traces are full of brackets
            return 1
        results = {cell: compare(cell, Path(folder)) for cell in cells}
    show(results)
    wrong = [cell for cell, found in results.items() if found]
    seconds = time.monotonic() - started
    if wrong:
        console.print(
            f"[red]{len(wrong)} of {len(cells)} modes are wrong[/] ({seconds:.0f} s); do "
            "not train several tasks under them with this DeepSpeed"
        )
        return 1
    note_pass(options.world, len(cells))
    console.print(f"all {len(cells)} modes equal plain PyTorch ({seconds:.0f} s)")
    return 0


def is_affected(cell: "Cell") -> bool:
    """Whether stale gradients are known in this mode and could show in this cell."""
    from pretrain.engine.zero.stale_gradients import affected

    return cell.tasks != "one" and affected(cell.stage, cell.offload)


def launch(cells: "Sequence[Cell]", world: int, out: Path) -> str:
    """Run the cells on `world` CPU processes; the end of the output of a failed one, or ""."""
    logs = [out / f"rank_{rank}.txt" for rank in range(world)]
    module = "tools.selfcheck.parity_cells"
    command = [sys.executable, "-m", module, str(out), *(c.name for c in cells)]
    port = free_port()
    processes = []
    for rank, path in enumerate(logs):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with open(path, "w", encoding="utf-8") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    failed = ""
    deadline = time.monotonic() + TIME_LIMIT_S
    while not failed and any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if time.monotonic() > deadline:
            failed = f"no end after {TIME_LIMIT_S} s"
        for process, path in zip(processes, logs, strict=True):
            if process.poll():
                failed = tail(path)
    for process, path in zip(processes, logs, strict=True):
        if failed:
            process.kill()
        if process.wait() and not failed:
            failed = tail(path)
    return failed


def tail(log: Path) -> str:
    """The end of a process's output."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_references: dict = {}


def compare(cell: "Cell", out: Path) -> list[str]:
    """Differences of a cell from plain PyTorch; see `parity_cells.faults`."""
    from tools.selfcheck.parity_cells import faults, plain_run

    if cell.tasks == "reentrant":
        return faults(cell, out, None)
    key = (cell.tasks, cell.optimizer)
    if key not in _references:
        _references[key] = plain_run(*key)
    return faults(cell, out, _references[key])


def show(results: "dict[Cell, list[str]]") -> None:
    """A table: stage and offload by optimizer and accumulation."""
    from tools.selfcheck.parity_cells import OPTIMIZERS, Cell

    words = {
        "one": "one task",
        "all": "tasks in turn",
        "mixed": "tasks mixed",
        "reentrant": "reentrant refused",
    }
    columns = [
        (tasks, optimizer, micro) for tasks in words for optimizer in OPTIMIZERS for micro in (1, 3)
    ]
    columns = [
        c for c in columns if any((r.tasks, r.optimizer, r.micro_steps) == c for r in results)
    ]
    table = Table("mode", *(f"{o}, {words[t]}, {m} micro" for t, o, m in columns))
    for stage, offload in sorted({(c.stage, c.offload) for c in results}):
        row = [f"ZeRO-{stage}{', offload' if offload else ''}"]
        for tasks, optimizer, micro in columns:
            found = results.get(Cell(stage, offload, micro, tasks, optimizer))
            row.append("" if found is None else "[red]wrong[/]" if found else "equal")
        table.add_row(*row)
    console.print(table)
    for cell, found in results.items():
        if found:
            console.print(f"{cell.name}: {found[0]}; {len(found)} differences", highlight=False)


def note_pass(world: int, cells: int) -> None:
    """Write the record that training asks for on an unlisted version of DeepSpeed."""
    from pretrain.engine.zero.stale_gradients import record_path

    path = record_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {
            "passed": True,
            "world": world,
            "cells": cells,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        path.write_text(json.dumps(note) + "\n", encoding="utf-8")
        console.print(f"noted in {path}", highlight=False)
    except OSError as error:
        console.print(
            f"the pass could not be noted in {path}: {error.strerror}; training several "
            f"tasks on an unlisted DeepSpeed will ask again. Set {CACHE_VARIABLE} to a "
            "folder that can be written, here and there",
            highlight=False,
        )


if __name__ == "__main__":
    sys.exit(main())
