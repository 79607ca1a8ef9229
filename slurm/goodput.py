"""Where the time of a run went: into steps that count, or into what."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.run_files import control, read_attempts, read_json

KINDS = ("steps", "between steps", "starts", "ends", "waiting")
"""Steps that count; saves, evaluations and slow steps; from the start of a try to its first step;
from the last step of a try that counts to its end, with all that is done again; without a try."""


def tries_of(run: Path, now: float) -> list[tuple[float, float]]:
    """Start and end of each try, that which is running too."""
    spans = [(a["started"], a["started"] + a["seconds"]) for a in read_attempts(run)]
    running = read_json(control(run, "supervisor.json"))
    if running.get("try", 0) > len(spans):
        spans.append((running["started"], now))
    return spans


def lines_of(run: Path) -> list[tuple[int, float]]:
    """Step and time of every logged step. Those that were done again are there once: a restore
    cuts the lines behind its checkpoint."""
    found = []
    try:
        with open(run / "metrics.jsonl", encoding="utf-8", errors="replace") as file:
            for text in file:
                if '"kind": "train"' in text and text.endswith("}\n"):
                    line = json.loads(text)
                    found.append((line["step"], line["time"]))
    except (OSError, ValueError, KeyError):
        pass
    return found


def seconds_of_kinds(
    tries: Sequence[tuple[float, float]],
    lines: Sequence[tuple[int, float]],
    step_s: float,
    since: float,
    now: float,
    before: int = 0,
) -> dict[str, float]:
    """Seconds from `since` to `now` by `KINDS`; their sum is all of them.

    Args:
        tries: start and end of each, in order.
        lines: step and time, in order.
        step_s: what a step takes where nothing disturbs it.
        before: the step that the first try went on from.
    """
    spent = dict.fromkeys(KINDS, 0.0)
    over = since  # the end of the try before, as `before` is its last step that counts
    for start, end in tries:
        start, end = max(start, over), max(end, over)
        spent["waiting"] += start - over
        inside = [(step, at) for step, at in lines if start <= at <= end]
        over = end
        if not inside:
            spent["ends"] += end - start
            continue
        (first, began), (last, ended) = inside[0], inside[-1]
        steps = min((first - before) * step_s, began - start)
        spent["starts"] += began - start - steps
        useful = min((last - first) * step_s, ended - began)
        spent["steps"] += steps + useful
        spent["between steps"] += ended - began - useful
        spent["ends"] += end - ended
        before = last
    spent["waiting"] += max(now - over, 0.0)
    return spent


def shares(run: Path, step_s: float | None, now: float | None = None) -> dict[str, float]:
    """Share of each kind in the time since the run was submitted, or first tried, until it was
    over; {} if nothing is known yet."""
    now = now or time.time()
    attempts, tries, lines = read_attempts(run), tries_of(run, now), lines_of(run)
    if not tries or not lines or not step_s:
        return {}
    submitted = [path.stat().st_mtime for path in run.glob("submit/001.sbatch")]
    since = min([tries[0][0], *submitted])
    if attempts and attempts[-1].get("decision") in ("done", "stop", "leave", "give up"):
        now = tries[-1][1]
    before = attempts[0]["steps"][0] if attempts else 0
    spent = seconds_of_kinds(tries, lines, step_s, since, now, before)
    total = max(sum(spent.values()), 1e-9)
    return {kind: seconds / total for kind, seconds in spent.items()}


def words(found: dict[str, float]) -> str:
    """`goodput 61% (starts 20%, waiting 12%, ends 7%)`."""
    rest = sorted(((share, kind) for kind, share in found.items() if kind != "steps"), reverse=True)
    listed = ", ".join(f"{kind} {share:.0%}" for share, kind in rest if share >= 0.005)
    return f"goodput {found['steps']:.0%}" + (f" ({listed})" if listed else "")
