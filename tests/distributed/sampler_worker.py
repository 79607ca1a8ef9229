"""One rank of two tasks under ZeRO-2, in block and mixed steps, and of ranks that disagree.

Usage: python -m tests.distributed.sampler_worker OUT_DIR   (under the ranks' environment)
Every rank writes rank_N.json: losses per mode, and the message of each disagreement.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.order.step_sampler import MicroBatch
from pretrain.engine.agreement import Agreement, RanksDisagree
from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.ownership import Ownership, claim
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.loop import Loop, TrainerState
from pretrain.engine.zero.zero import start_engine
from pretrain.models.multitask import MultiTaskModel
from pretrain.sampler import Schedule, Stage, build_schedule
from tests.distributed.engines import SEED, SGD, deepspeed_config
from tests.distributed.toy import SAMPLES, ToyEncoder, ToyObjective, toy_batch

STEPS = 16
WEIGHTS = {"words": 1.0, "others": 2.0}
MODES = ("block", "mixed")
LOSS_WEIGHTS = {"words": 1.0, "others": 0.5}
"""Factors of the tasks' own, beside those of the schedule."""


def two_tasks() -> MultiTaskModel:
    return MultiTaskModel(
        {"image": ToyEncoder()}, {name: ToyObjective() for name in sorted(WEIGHTS)}
    )


def schedule_of(mode: str) -> Schedule:
    return build_schedule([Stage(0, mode, WEIGHTS)], WEIGHTS, SEED)


def loss_weights(schedule: Schedule, step: int) -> dict[str, float]:
    return {task: w * LOSS_WEIGHTS[task] for task, w in schedule.loss_weights(step).items()}


def global_batch(task: str, visit: int) -> dict[str, torch.Tensor]:
    return toy_batch(visit + 5000 * sorted(WEIGHTS).index(task))


class ToyStream:
    """What the loader needs of a task; others have smaller micro-batches."""

    global_batch, order = SAMPLES, None

    def __init__(self, task: str) -> None:
        self.task, self.micro_batch = task, 4 if task == "words" else 2

    def load(self, request: MicroBatch, allocate) -> dict:
        positions = torch.tensor(request.positions)
        whole = global_batch(request.task, int(positions[0]) // SAMPLES)
        rows = {name: values[positions % SAMPLES] for name, values in whole.items()}
        return {**rows, "position": positions, "seconds": {}, "counters": {}, "faults": []}

    def locate(self, positions: np.ndarray) -> list[str]:
        return ["toy"] * len(positions)


class Cells:
    """Loops on this rank; a fresh engine for each training cell, one for all disagreements."""

    def __init__(self, ranks, out: Path) -> None:
        self.ranks, self.out, self.signals = ranks, out, StopSignals()
        self.engine = None
        # Rank 0's is asked for; the other knows a token that nobody has.
        owner = claim(out, {}) if ranks.leads else Ownership(out, "")
        self.control = ControlFolder(out, owner)

    def start(self) -> None:
        config = deepspeed_config(2, "fp32", SGD)
        self.engine = start_engine(two_tasks, SGD, config, SEED, self.ranks.device)

    def run(self, schedule, steps=range(STEPS), rank=None, every=5, common=None):
        """Losses by task, samples and reports of one loop."""
        loader = StepLoader(
            {task: ToyStream(task) for task in WEIGHTS},
            schedule,
            LoaderSettings(workers=0),
            self.ranks.rank if rank is None else rank,
            self.ranks.world,
            steps[0],
            steps[-1] + 1,
        )
        loop = Loop(
            self.engine,
            self.ranks,
            SEED,
            (SGD.lr, lambda step: 1.0),
            0,
            dict.fromkeys(WEIGHTS, SAMPLES),
            self.control,
            self.signals,
            lambda step: loss_weights(schedule, step),
            Agreement(self.ranks, every, common),
        )
        found = []
        state = TrainerState(step=steps[0])
        loop.run(
            loader,
            state,
            wants_report=lambda step, stops: True,
            on_report=lambda state, report: found.append((state.step, asdict(report))),
            after_step=lambda state, save: False,
        )
        return {
            "samples": state.samples,
            "losses": [
                (
                    step,
                    report["task"],
                    report["metrics"]["loss"],
                    report["metrics"].get("loss_weight"),
                )
                for step, report in found
            ],
        }

    def disagreement(self, *arguments, **options) -> str:
        try:
            self.run(*arguments, **options)
        except RanksDisagree as error:
            return str(error)
        return "nothing was noticed"


def main() -> None:
    out = Path(sys.argv[1])
    ranks = init_distributed(threads_per_rank=1)
    cells = Cells(ranks, out)
    results: dict = {}
    for mode in MODES:
        cells.start()
        results[mode] = cells.run(schedule_of(mode))
    mine = "words" if ranks.rank == 0 else "others"
    turning = build_schedule(
        [Stage(0, "block", WEIGHTS), Stage(3, "block", {mine: 1.0})], WEIGHTS, SEED
    )
    results["task"] = cells.disagreement(turning, every=1)
    results["mixture"] = cells.disagreement(schedule_of(MODES[ranks.rank]))
    results["step"] = cells.disagreement(schedule_of("block"), range(ranks.rank, STEPS))
    results["deal"] = cells.disagreement(schedule_of("block"), rank=0)
    data = {"data of words": f"digest{ranks.rank}"}
    results["data"] = cells.disagreement(schedule_of("block"), common=data)
    results["still able"] = len(cells.run(schedule_of("block"), range(2))["losses"])
    (out / f"rank_{ranks.rank}.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)
