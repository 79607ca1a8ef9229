"""A trainer without torch that obeys the control files, for tests of what is around a run.

    python -m tests.slurm.toy_trainer RUN --steps 100 [--step-s 0.05] [--fail-at 7] [--hang-at 7]
           [--always-fail]

Each task of a SLURM step, or each of --ranks processes, is a rank; rank 0 keeps the files.
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    for name, kind, default in (("steps", int, 100), ("step-s", float, 0.05), ("ranks", int, 1),
                                ("fail-at", int, -1), ("hang-at", int, -1)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--always-fail", action="store_true")
    options, _ = parser.parse_known_args()
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    for number in range(1, options.ranks):
        if not os.fork():
            rank = number
            break
    control, asked = options.run / "control", []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
    checkpoints = sorted(options.run.glob("checkpoints/step_*"))
    step = int(checkpoints[-1].name[5:]) if checkpoints else 0
    first, parent = step == 0, os.getppid()

    def save(state: str, reason: str = "") -> None:
        if rank == 0:
            write(options.run / f"checkpoints/step_{step:09d}/manifest.json", {"step": step})
            write(control / "status.json", {"state": state, "step": step, "reason": reason})

    if rank == 0:
        job = os.environ.get("SLURM_JOB_ID")
        write(control / "owner.json", {"job": f"SLURM_JOB_ID={job}" if job else None,
                                       "host": os.uname().nodename, "pid": os.getpid()})
        write(control / "status.json", {"state": "running", "step": step, "reason": ""})
    while step < options.steps:
        if step == options.fail_at and (first or options.always_fail):
            write(control / "status.json", {"state": "failed", "step": step, "reason": "it fell"})
            return 1
        if first and step == options.hang_at:
            time.sleep(1000)
        files = [name for name in ("stop", "stop.auto") if (control / name).exists()]
        if asked or files or os.getppid() != parent:
            save("stopped", (asked + files + ["an orphan"])[0])
            return 0
        time.sleep(options.step_s)
        step += 1
        if rank == 0:
            (control / "heartbeat").touch()
            with open(options.run / "steps.txt", "a", encoding="utf-8") as file:
                file.write(f"{step}\n")
        if step % 10 == 0:
            save("running")
    save("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
