"""What follows when a try of a run has ended: a pure function (its table: tests/slurm/test_decide).

Judged by what the trainer says of itself and by the steps that were made, not by exit codes alone:
launchers hide them (srun says 143 for peers that it killed, deepspeed 0 for a killed launch.py).
"""

from dataclasses import dataclass
from typing import Literal

Action = Literal["done", "stop", "leave", "restart", "requeue", "give up"]

REFUSED, LOST, BAD_NODE, NO_PROGRESS, AGAIN = 2, 3, 12, 13, 75
"""Exit codes: of the trainer (wrong recipe or owner alive; directory lost), of a job whose node is
bad, of a run that got nowhere, and of a job that is to be followed by another one."""


@dataclass(frozen=True)
class Outcome:
    """How a try ended."""

    state: str
    """status.json: starting, running, stopped, finished, failed; "" if there is none."""
    reason: str
    """Its reason, in words."""
    code: int
    """Exit code of the launcher; negative after a signal."""
    steps: tuple[int, int]
    """Step of the last checkpoint before and after."""
    fruitless: int
    """Tries before this one, in a row, that made no new step."""
    stop_asked: bool = False
    """A person has asked for a stop (control/stop)."""
    leaving: str = ""
    """Why the job itself has to end (time limit, preemption); "" if it may go on."""
    restarts_left: int = 0
    """How often the launcher may be started again on these nodes."""
    most_fruitless: int = 3
    """So many tries in a row without a new step end the run."""

    @property
    def fruitless_now(self) -> int:
        """Tries in a row without a new step, this one included."""
        return 0 if self.steps[1] > self.steps[0] else self.fruitless + 1


@dataclass(frozen=True)
class Decision:
    """What to do, the exit code of the job, and why."""

    action: Action
    code: int
    why: str


def decide(outcome: Outcome) -> Decision:
    """What to do after a try.

    done, stop: nothing follows. leave: nothing follows, since the run is another job's. restart:
    the launcher again, on the same nodes. requeue: the job again, or the next one of its chain.
    give up: the trainer refuses the run, or gets nowhere; what waits in the chain is cancelled.
    """
    if outcome.state == "finished":
        return Decision("done", 0, "finished")
    if outcome.stop_asked:
        saved = outcome.state == "stopped"
        return Decision(
            "stop",
            0 if saved else 1,
            "a person asked for a stop"
            + ("" if saved else f", but the run ended: {outcome.reason}"),
        )
    if outcome.code == LOST:
        return Decision("leave", LOST, "another job has taken over the run")
    if outcome.code == REFUSED:
        return Decision("give up", REFUSED, f"the trainer refused to start: {outcome.reason}")
    if outcome.fruitless_now >= outcome.most_fruitless:
        return Decision(
            "give up",
            NO_PROGRESS,
            f"{outcome.fruitless_now} tries in a row made no new step; the last one: "
            f"{outcome.reason or outcome.state or 'said nothing'}",
        )
    if outcome.code == BAD_NODE:
        return Decision("requeue", BAD_NODE, outcome.reason)
    why = outcome.leaving or outcome.reason or f"the launcher ended with {outcome.code}"
    if not outcome.leaving and outcome.restarts_left > 0:
        return Decision("restart", AGAIN, why)
    return Decision("requeue", AGAIN, why)
