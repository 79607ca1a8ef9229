"""What a step counted: a mean over nothing has no value, and a loss without targets is told of.

An objective says by `counted_by` what its metrics are means over: name -> names of its counts, of
which one must be above 0 for the metric to have a value. What stands under "loss" are the parts of
the loss. The sums over all ranks decide, so that all of them conclude the same.
"""

import logging
from collections.abc import Collection, Mapping

from pretrain.objectives.objective import Objective

log = logging.getLogger("omnipretrain.loop")

PATIENCE_STEPS = 100
"""Steps of a task in a row without targets for a part of its loss, after which that is told."""


def has_targets(objective: Objective, counts: Mapping[str, float]) -> bool:
    """Whether a step counted anything that the loss is a mean over; else it has no gradient, and
    its norm no value."""
    counted_by = objective.counted_by
    return "loss" not in counted_by or any(counts[count] for count in counted_by["loss"])


def with_absences(
    objective: Objective, metrics: Mapping[str, float], counts: Mapping[str, float]
) -> dict[str, float | None]:
    """The metrics of a step; None in place of those of which nothing was counted.

    counts: sums of the objective's counts over the global batch.
    """
    counted_by = objective.counted_by
    return {
        name: value if name not in counted_by or any(counts[c] for c in counted_by[name]) else None
        for name, value in metrics.items()
    }


class TargetWatch:
    """Warns, once for each, of parts of a loss that stay without targets.

    Args:
        speaks: whether this rank logs; all see the same counts.
        meant: tasks whose recipe says that targets are missing (`unlabelled: expected`).
    """

    def __init__(self, speaks: bool, meant: Collection[str] = ()) -> None:
        self.speaks, self.meant = speaks, frozenset(meant)
        self._empty: dict[tuple[str, str], int] = {}
        self._told: set[tuple[str, str]] = set()

    def observe(
        self, step: int, task: str, objective: Objective, counts: Mapping[str, float]
    ) -> None:
        """Take in the sums of a task's counts over the global batch of step `step`."""
        counted_by = objective.counted_by
        for count in counted_by.get("loss", ()):
            empty = 0 if counts[count] else self._empty.get((task, count), 0) + 1
            self._empty[task, count] = empty
            told = (task, count) in self._told
            if empty >= PATIENCE_STEPS and self.speaks and not told and task not in self.meant:
                self._told.add((task, count))
                silent = [name for name, counts_of in counted_by.items() if counts_of == (count,)]
                log.warning(
                    "task %s: no %s in any of the last %d steps up to step %d, so that nothing is "
                    "learned from them (without a value: %s): look at what the samples hold with "
                    "`python -m pretrain check RUN/recipe.yaml`; where labels or boxes "
                    "may be missing, say tasks.%s.data.unlabelled=expected (boxes: unannotated)",
                    task,
                    count,
                    PATIENCE_STEPS,
                    step,
                    ", ".join(silent) or "nothing",
                    task,
                )
