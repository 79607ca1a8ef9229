"""Weights that change at set steps, and a record of them that no later edit can touch.

A schedule of stages is still a pure function of the step: the visits before a border are those of
the stages before it, in closed form. What a run has trained on must not change when somebody edits
the stages of its recipe and resumes. So the plan is written to the run's ledger when it is first
used, and again whenever a start finds another one:

    {"kind": "weights", "step": 0, "stages": [{"from_step": 0, "mode": "block", "weights": {...}}]}

An entry is in force from its `step` to that of the next entry; the ledger alone decides what ran.
At every start, new or resumed, after the state is restored and before the loader is made:

    state.ledger += ledger_entries(planned, state.ledger, state.step)
    schedule = build_schedule(stages_of(state.ledger), tasks, seed)
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.rng import keyed_u64
from pretrain.sampler.iid import IidSchedule
from pretrain.sampler.schedule import BlockSchedule, MixedSchedule, Schedule, checked_step

KIND = "weights"


@dataclass(frozen=True)
class Stage:
    """What is in force from a step on. Tasks without a weight are off."""

    from_step: int
    mode: str
    """block, iid or mixed."""
    weights: dict[str, float]
    """Task -> weight (> 0)."""

    def is_like(self, other: "Stage") -> bool:
        """Whether one may go on where the other stood."""
        return (self.mode, self.weights) == (other.mode, other.weights)

    def schedule(self, seed: int) -> Schedule:
        """The schedule of this stage; its step 0 is `from_step`."""
        if self.from_step:  # or equal stages would repeat each other
            seed = keyed_u64(seed, "stage", self.from_step) >> 1
        if self.mode == "mixed":
            return MixedSchedule(self.weights)
        return {"block": BlockSchedule, "iid": IidSchedule}[self.mode](self.weights, seed)


def build_schedule(
    stages: Sequence[Stage],
    names: Iterable[str],
    seed: int,
    loss_weights: Mapping[str, float] | None = None,
) -> Schedule:
    """The schedule of a run.

    Args:
        stages: the first from step 0 on, in the order of their steps.
        names: all tasks of the run, also those that are off.
        seed: the run's seed.
        loss_weights: task -> factor of its loss in every step that runs it; None: 1.

    Raises:
        ValueError: a stage names a task that the run does not have.
    """
    names = sorted(names)
    for stage in stages:
        if unknown := sorted(set(stage.weights) - set(names)):
            raise ValueError(
                f"the stage from step {stage.from_step} runs {', '.join(unknown)}, but the run has "
                f"the tasks {', '.join(names)} only"
            )
    if len(stages) == 1 and sorted(stages[0].weights) == names:
        schedule = stages[0].schedule(seed)
    else:
        schedule = StagedSchedule(stages, names, seed)
    schedule.own_weights = dict(loss_weights or {})
    return schedule


class StagedSchedule(Schedule):
    """Stages one behind the other; visits of a task go on across borders."""

    def __init__(self, stages: Sequence[Stage], names: Sequence[str], seed: int) -> None:
        """As `build_schedule`. Raises ValueError for stages that are not in order from step 0."""
        self._starts = [stage.from_step for stage in stages]
        if not stages or self._starts[0] != 0 or self._starts != sorted(set(self._starts)):
            raise ValueError(f"stages must begin at step 0 and be in order, not {self._starts}")
        self.names = list(names)
        self._stages = [stage.schedule(seed) for stage in stages]
        self.most_parts = max(stage.most_parts for stage in self._stages)
        self._before = [dict.fromkeys(self.names, 0)]
        for stage, start, end in zip(self._stages, self._starts, self._starts[1:], strict=False):
            self._before.append(_add(self._before[-1], stage.visits(end - start)))

    def __call__(self, step: int) -> tuple[str, int]:
        stage, before, local = self._find(step)
        task, visit = stage(local)
        return task, before[task] + visit

    def parts(self, step: int) -> list[tuple[str, int]]:
        stage, before, local = self._find(step)
        return [(task, before[task] + visit) for task, visit in stage.parts(local)]

    def visits(self, step: int) -> dict[str, int]:
        stage, before, local = self._find(step)
        return _add(before, stage.visits(local))

    def ratio(self, step: int) -> dict[str, float]:
        stage, _, local = self._find(step)
        return dict.fromkeys(self.names, 0.0) | stage.ratio(local)

    def loss_shares(self, step: int) -> dict[str, float]:
        stage, _, local = self._find(step)
        return stage.loss_shares(local)

    def describe(self) -> str:
        lines = []
        for stage, start in zip(self._stages, self._starts, strict=True):
            off = [name for name in self.names if name not in stage.names]
            rest = f"; off: {', '.join(off)}" if off else ""
            lines.append(f"from step {start}: {stage.describe()}{rest}")
        return "\n".join(lines)

    def _find(self, step: int) -> tuple[Schedule, dict[str, int], int]:
        number = bisect_right(self._starts, checked_step(step)) - 1
        return self._stages[number], self._before[number], step - self._starts[number]


# -------------------------------------------------------------------------------------- the ledger


def ledger_entries(
    planned: Sequence[Stage], ledger: Sequence[Mapping[str, Any]], step: int
) -> list[dict[str, Any]]:
    """What to append to the ledger of a run that starts at `step` with the plan of its recipe.

    Nothing if the plan is the one that is in force already. A run whose ledger knows no plan (older
    than this record) is taken to have followed the present one from step 0.
    """
    entries = [entry for entry in ledger if entry["kind"] == KIND]
    stages = [asdict(stage) for stage in planned]
    if entries and entries[-1]["stages"] == stages:
        return []
    return [{"kind": KIND, "step": step if entries else 0, "stages": stages}]


def stages_of(ledger: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """What ran, and what is to run, by the ledger. Empty if it records no plan.

    A plan that says for its first step what was in force anyway lets the present stage go on;
    otherwise a new stage begins there. A stage that should have begun earlier begins there, too.
    """
    stages: list[Stage] = []
    for entry in ledger:
        if entry["kind"] != KIND:
            continue
        start, planned = entry["step"], [Stage(**stage) for stage in entry["stages"]]
        wanted = [stage for stage in planned if stage.from_step <= start][-1]
        kept = [stage for stage in stages if stage.from_step <= start]
        if not kept or not kept[-1].is_like(wanted):
            kept = [stage for stage in kept if stage.from_step < start]
            kept.append(Stage(start, wanted.mode, wanted.weights))
        stages = kept + [stage for stage in planned if stage.from_step > start]
    return stages


def _add(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: count + other.get(name, 0) for name, count in one.items()}
