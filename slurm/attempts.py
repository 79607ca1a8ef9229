"""RUN/attempts.jsonl: one line for each try of a run, and what is drawn from it."""

import json
from collections import Counter
from pathlib import Path


def read_attempts(run: Path) -> list[dict]:
    """All tries so far, the oldest first; lines that a crash has cut are left out."""
    try:
        lines = (run / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    attempts = []
    for line in lines:
        try:
            attempts.append(json.loads(line))
        except ValueError:
            continue
    return [attempt for attempt in attempts if isinstance(attempt, dict)]


def note_attempt(run: Path, **fields) -> None:
    """Append a try: attempt, job, nodes, steps, seconds, started, state, reason, decision, ..."""
    number = len(read_attempts(run)) + 1
    with open(run / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"attempt": number, **fields}) + "\n")


def fruitless(attempts: list[dict]) -> int:
    """Tries at the end of the list that made no new step."""
    count = 0
    for attempt in reversed(attempts):
        before, after = attempt.get("steps", (0, 0))
        if after > before:
            break
        count += 1
    return count


def suspects(attempts: list[dict]) -> list[str]:
    """Nodes to keep away from: those that failed a check, or were named in two tries."""
    named = Counter(node for attempt in attempts for node in attempt.get("suspects", ()))
    unfit = {node for attempt in attempts for node in attempt.get("unfit", ())}
    return sorted(unfit | {node for node, times in named.items() if times >= 2})
