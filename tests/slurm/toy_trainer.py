"""A trainer without torch that obeys the control files, for tests of what is around a run.

    python -m tests.slurm.toy_trainer RUN --steps 100 [--step-s 0.05] [--start-s 0] [--fail-at 7]
           [--hang-at 7] [--always-fail] [--deaf]

Each task of a SLURM step, or each of --ranks processes, is a rank. All ranks meet at every step, as
in a collective: one that is gone makes the others wait. Rank 0 keeps the run's files.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.uname().nodename}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


class Toy:
    """One rank of a toy run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.run = options, options.run
        self.control, self.asked = options.run / "control", []
        self.rank = int(os.environ.get("SLURM_PROCID") or os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("WORLD_SIZE", 1))
        for number in range(1, options.ranks):
            if not os.fork():
                self.rank = number
                break
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self.asked.append(signal.Signals(number).name))
        checkpoints = sorted(self.run.glob("checkpoints/step_*"))
        self.step = int(checkpoints[-1].name[5:]) if checkpoints else 0
        self.first, self.parent = self.step == 0, os.getppid()
        launch = "{}.{}".format(*(os.environ.get(f"SLURM_{n}_ID", "x") for n in ("JOB", "STEP")))
        self.meeting = self.control / "meeting" / launch
        write(
            self.control / "pids" / f"rank_{self.rank}.json",
            {
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            },
        )
        time.sleep(options.start_s)

    def told_to_stop(self) -> str:
        """Why to save and leave, or ""."""
        if self.options.deaf:
            return ""
        files = [name for name in ("stop", "stop.auto") if (self.control / name).exists()]
        orphan = ["an orphan"] if os.getppid() != self.parent else []
        return (self.asked + files + orphan + [""])[0]

    def meet(self) -> bool:
        """Wait for all ranks of this launch; False if told to stop meanwhile."""
        if self.world == 1:
            return True
        write(self.meeting / f"rank_{self.rank}", {"step": self.step})
        others = range(1, self.world) if self.rank == 0 else [0]
        for other in others:
            while self._at(other) < self.step + (self.rank != 0):
                if self.told_to_stop():
                    return False
                time.sleep(0.01 if self.world < 16 else 0.2)
        if self.rank == 0:
            write(self.meeting / "rank_0", {"step": self.step + 1})
        return True

    def _at(self, rank: int) -> int:
        try:
            return json.loads((self.meeting / f"rank_{rank}").read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError):
            return -1

    def save(self, state: str, reason: str = "") -> None:
        if self.rank != 0:
            return
        write(self.run / f"checkpoints/step_{self.step:09d}/manifest.json", {"step": self.step})
        self.say(state, reason)

    def say(self, state: str, reason: str = "") -> None:
        write(self.control / "status.json", {"state": state, "step": self.step, "reason": reason})

    def own(self, **more) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        write(
            self.control / "owner.json",
            {
                "job": f"SLURM_JOB_ID={job}" if job else None,
                "host": os.uname().nodename,
                "pid": os.getpid(),
                **more,
            },
        )

    def train(self) -> int:
        if self.rank == 0:
            self.own()
            self.say("running")
        options = self.options
        while self.step < options.steps:
            if self.step == options.fail_at and (self.first or options.always_fail):
                self.say("failed", "it fell")
                return 1
            if self.step == options.hang_at and not (self.control / "hung").exists():
                (self.control / "hung").touch()
                time.sleep(1000)
            if not self.meet() or self.told_to_stop():
                self.save("stopped", self.told_to_stop())
                return 0
            time.sleep(options.step_s)
            self.step += 1
            if self.rank == 0:
                (self.control / "heartbeat").touch()
                with open(self.run / "steps.txt", "a", encoding="utf-8") as file:
                    file.write(f"{self.step}\n")
            if self.step % 10 == 0:
                self.save("running")
        self.save("finished")
        return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    for name, kind, default in (
        ("steps", int, 100),
        ("step-s", float, 0.05),
        ("start-s", float, 0),
        ("ranks", int, 1),
        ("fail-at", int, -1),
        ("hang-at", int, -1),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--always-fail", action="store_true")
    parser.add_argument("--deaf", action="store_true", help="leaves when killed, not before")
    options, _ = parser.parse_known_args()
    toy = Toy(options)
    code = toy.train()
    if toy.rank == 0:
        toy.own(left=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
