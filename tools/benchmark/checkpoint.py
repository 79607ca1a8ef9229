"""How long a checkpoint holds training up: written between two steps, or behind them.

All cases save the same optimizer's partitions, in turns. What counts is the stall: the time in
which no step can be taken. For those that write while training goes on, steps are taken meanwhile,
and it is said how much slower these are. The peers are torch.distributed.checkpoint's `async_save`
and DeepSpeed's `save_checkpoint`; the limits are a copy in memory (of a stall) and a plain write of
as many bytes, forced to the disk (of the time until a checkpoint is durable).
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.benchmark import engine as bench_engine
from tools.support.measure import say, seconds_left, shorten

SYNCHRONOUS, BEHIND = "written between steps", "asynchronous"
DCP, DEEPSPEED = "torch.distributed.checkpoint async_save", "DeepSpeed save_checkpoint"
COPY, WRITE = "limit: copy in memory", "limit: write and fsync"
_QUIET_STEPS = 3
_CHUNK = 1 << 24


@dataclass
class Turn:
    """One save: seconds in which training stood still, until it was durable, of steps meanwhile."""

    stall: float
    durable: float
    steps: list[float] = field(default_factory=list)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    from pretrain.engine.launch.distributed import init_distributed, shutdown

    ranks = init_distributed(threads_per_rank=1)
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            return _measure(args, ranks, Path(folder))
    finally:
        shutdown()


def _measure(args: argparse.Namespace, ranks, folder: Path) -> dict[str, Any]:
    say("starting the engine")
    bench = _Bench(args, ranks, folder)
    try:
        first = bench.cases[BEHIND]()  # makes the memory and the writer
        turns, quiet = _in_turns(bench, args.repeats)
    finally:
        bench.checkpoints.close()
    stalls = {name: median(turn.stall for turn in done) for name, done in turns.items()}
    share = median(
        b.stall / s.stall for b, s in zip(turns[BEHIND], turns[SYNCHRONOUS], strict=True)
    )
    return {
        "title": f"Saving {bench.size / 1e6:,.0f} MB on one rank (ZeRO-{args.zero})",
        "rows": [
            {
                "case": name,
                "stall s": stalls[name],
                "share of ours between steps": stalls[name] / stalls[SYNCHRONOUS],
                "durable after s": median(turn.durable for turn in done),
                "steps meanwhile, times as long": _slower(done, quiet),
            }
            for name, done in turns.items()
        ],
        "bars": [
            {
                "what": "stall of an asynchronous save, share of one between steps",
                "measured": share,
                "bar": 0.1,
                "at_least": False,
            },
            {
                "what": "the same, times as long as a copy in memory takes",
                "at_least": False,
                "measured": stalls[BEHIND] / stalls[COPY],
                "bar": 1.5,
            },
        ],
        "notes": [
            f"the first asynchronous save, which allocates its memory: {first.stall:.2f} s",
            f"a step without a save takes {quiet:.2f} s; the writer runs at a lower priority, and "
            "where there is no core for it, steps share theirs",
        ],
    }


def _slower(done: list[Turn], quiet: float) -> float | None:
    steps = [seconds for turn in done for seconds in turn.steps]
    return median(steps) / quiet if steps else None


def _in_turns(bench: "_Bench", repeats: int) -> tuple[dict[str, list[Turn]], float]:
    """Turns of each case, and the seconds of a step without a save."""
    turns: dict[str, list[Turn]] = {name: [] for name in bench.cases}
    quiet: list[float] = []
    for number in range(1, repeats + 1):
        begun = time.perf_counter()
        quiet += [bench.step() for _ in range(_QUIET_STEPS)]
        for name, case in bench.cases.items():
            turns[name].append(case())
            say(f"{number}/{repeats}: {name}: stall {turns[name][-1].stall:.2f} s")
        if number < repeats and seconds_left() < time.perf_counter() - begun:
            shorten(f"{number} of {repeats} repetitions")
            break
    return turns, median(quiet)


class _Bench:
    """The engine, and its saves; each leaves nothing behind."""

    def __init__(self, args: argparse.Namespace, ranks, folder: Path) -> None:
        from pretrain.engine.checkpoint.background_save import BackgroundCheckpoints
        from pretrain.engine.checkpoint.checkpoint import CheckpointSettings
        from pretrain.engine.checkpoint.contents import rank_contents
        from pretrain.engine.checkpoint.files import rank_files

        self.args, self.folder = args, folder
        self.engine = bench_engine._engine(args, ranks)
        self.batches = {"caption": bench_engine._batches(args, "caption")}
        self.step()
        contents = rank_contents(self.engine, 0, {}, None, None, {})
        self.tensors = contents[rank_files(0)[0]]
        self.size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        self.checkpoints = BackgroundCheckpoints(
            folder / "ours", CheckpointSettings(keep_last=1), device=ranks.device
        )
        self.place = {name: t.to("cpu", copy=True) for name, t in self.tensors.items()}
        self.cases: dict[str, Callable[[], Turn]] = {
            SYNCHRONOUS: lambda: self._stopped(self._save),
            BEHIND: self._behind,
            DCP: self._dcp,
            DEEPSPEED: lambda: self._stopped(self._deepspeed),
            COPY: lambda: self._stopped(self._copy),
            WRITE: lambda: self._stopped(self._write),
        }

    def step(self) -> float:
        """Take a step; its seconds."""
        begun = time.perf_counter()
        bench_engine._bare(self.args, self.engine, self.batches)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    @staticmethod
    def _stopped(save: Callable[[], None]) -> Turn:
        begun = time.perf_counter()
        save()
        seconds = time.perf_counter() - begun
        return Turn(seconds, seconds)

    def _meanwhile(
        self, begin: Callable[[], None], busy: Callable[[], bool], advance: Callable[[], bool]
    ) -> Turn:
        """Begin a save, take steps while it is `busy`, and `advance` it until it has ended."""
        begun = time.perf_counter()
        begin()
        stall, steps, ended = time.perf_counter() - begun, [], False
        while not ended:
            while busy():
                steps.append(self.step())
            mark = time.perf_counter()
            ended = advance()
            stall += time.perf_counter() - mark
        return Turn(stall, time.perf_counter() - begun, steps)

    def _save(self) -> None:
        self.checkpoints.save(self.engine, 1, {})

    def _behind(self) -> Turn:
        return self._meanwhile(
            lambda: self.checkpoints.begin(self.engine, 2, {}),
            self.checkpoints.busy,
            self.checkpoints.advance,
        )

    def _dcp(self) -> Turn:
        import torch.distributed.checkpoint as dcp

        place, going = self.folder / "dcp", []
        try:
            return self._meanwhile(
                lambda: going.append(dcp.async_save(dict(self.tensors), checkpoint_id=str(place))),
                lambda: not going[0].done(),
                lambda: going[0].result() is not going,
            )
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _deepspeed(self) -> None:
        place = self.folder / "deepspeed"
        self.engine.save_checkpoint(str(place), tag="one")
        shutil.rmtree(place)

    def _copy(self) -> None:
        for name, tensor in self.tensors.items():
            self.place[name].copy_(tensor)

    def _write(self) -> None:
        place = self.folder / "plain"
        with open(place, "wb", buffering=0) as file:
            for tensor in self.place.values():
                content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                for begin in range(0, len(content), _CHUNK):
                    file.write(content[begin : begin + _CHUNK])
            os.fsync(file.fileno())
        place.unlink()
