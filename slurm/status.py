"""How runs stand: from their own files, and from SLURM where there is one.

    python -m slurm.status [FOLDER ...] [--json]       runs, or folders of runs (default: runs/)

Works without SLURM, and without its accounting.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import cluster, goodput, requests
from slurm.run_files import (
    age,
    control,
    last_checkpoint,
    read_attempts,
    read_json,
    status,
)

_TAIL_BYTES = 2**18
ALIVE_S = 60.0


def runs_of(folders: Sequence[Path]) -> list[Path]:
    """Run directories: the folders themselves, or those in them (two floors down at most)."""
    found = []
    for folder in folders:
        if _is_run(folder):
            found.append(folder)
            continue
        found += [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if _is_run(p)]
    return sorted({run.resolve() for run in found})


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "submit").is_dir()


def train_lines(run: Path) -> list[dict]:
    """The last logged steps, from the end of metrics.jsonl."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("kind") == "train":
            found.append(entry)
    return found


def seconds_a_step(lines: Sequence[dict]) -> float | None:
    """Median over the last logged steps, of time between lines by steps between them."""
    stamped = [(line["step"], line["time"]) for line in lines if _is_number(line.get("time"))]
    gaps = [
        (t1 - t0) / (s1 - s0)
        for (s0, t0), (s1, t1) in itertools.pairwise(stamped)
        if s1 > s0 and t1 > t0
    ]
    return statistics.median(gaps[-100:]) if gaps else None


def describe(run: Path, now: float | None = None) -> dict:
    """All that is known of a run, as numbers and texts."""
    now = now or time.time()
    said, lines, attempts = status(run), train_lines(run), read_attempts(run)
    total, step_s = total_steps(run), seconds_a_step(lines)
    step = lines[-1]["step"] if lines else last_checkpoint(run)
    state, beat = said.get("state", "new"), age(control(run, "heartbeat"))
    if state in ("running", "starting") and (beat is None or beat > ALIVE_S):
        state = "silent"
    jobs = cluster.jobs_of(run)
    checkpoint, spent = last_checkpoint(run), goodput.shares(run, step_s, now)
    found = {
        "run": str(run),
        "state": state,
        "phase": said.get("phase"),
        "step": step,
        "steps": total,
        "seconds_a_step": step_s,
        "jobs": jobs,
        "tries": len(attempts),
        "left_s": (total - step) * step_s if total and step_s and state == "running" else None,
        "checkpoint": checkpoint,
        "checkpoint_age_s": age(run / "checkpoints" / f"step_{checkpoint:09d}" / "manifest.json"),
        "time": spent,
        "goodput": spent.get("steps"),
        "reason": reason_of(said, attempts),
        "copied": read_json(control(run, "copies.json")),
        "slow_rank": said.get("slow_rank") if state == "running" else None,
    }
    if lines and lines[-1].get("loss") is not None:
        found["loss"] = lines[-1]["loss"]
    return found


def reason_of(said: dict, attempts: Sequence[dict]) -> str:
    """Why a run is as it is: what ended its last try for good, or what it says of itself."""
    last = attempts[-1] if attempts else {}
    ended = last.get("decision") in ("give up", "leave") and said.get("state") not in (
        "running",
        "starting",
        "finished",
    )
    return last.get("why", "") if ended else said.get("reason", "")


def total_steps(run: Path) -> int | None:
    """`steps` of the resolved recipe, which stands at its first level."""
    try:
        text = (run / "recipe.yaml").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^steps: (\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def line_of(found: dict) -> str:
    """A run in one line, what matters first."""
    parts = [f"{found['state']:9}", f"step {found['step']}/{found['steps'] or '?'}"]
    if found["jobs"]:
        parts.append(", ".join(f"job {j['job']} {j['state'].lower()}" for j in found["jobs"][:3]))
    if found["seconds_a_step"]:
        parts.append(f"{found['seconds_a_step']:.2f} s/step")
    if found["left_s"]:
        parts.append(f"{_span(found['left_s'])} left")
    if found["checkpoint_age_s"] is not None:
        parts.append(f"checkpoint {found['checkpoint']} {_span(found['checkpoint_age_s'])} ago")
    if copied := found["copied"]:
        parts.append(
            f"copied {copied.get('step') or 'nothing yet'}"
            + (f" (fails: {copied['error'][:160]})" if copied.get("error") else "")
        )
    if found["tries"] > 1:
        parts.append(f"{found['tries']} tries")
    if found["goodput"] is not None:
        parts.append(goodput.words(found["time"]))
    if slow := found["slow_rank"]:
        parts.append(
            f"waits for rank {slow['rank']} on {slow['host']} "
            f"({slow['factor']:.1f} times as slow as the others)"
        )
    if found["reason"]:
        parts.append(found["reason"].splitlines()[0][:160])
    return f"{found['run']}\n    " + "; ".join(parts)


def _span(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="slurm status", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    for verb in ("stop", "save"):
        parser.add_argument(f"--{verb}", metavar="RUN", help=f"as `slurm {verb} RUN`")
    options = parser.parse_intermixed_args(argv)
    for verb in ("stop", "save"):
        if run := getattr(options, verb):
            return requests.main([run], verb)
    runs = runs_of(options.folders)
    if not runs:
        print(f"no run in {', '.join(map(str, options.folders))}", file=sys.stderr)
        return 1
    for run in runs:
        found = describe(run)
        print(json.dumps(found) if options.json else line_of(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
