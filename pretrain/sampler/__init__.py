"""Which tasks run at which step: pure functions of (seed, step, weights).

No rank asks another, nothing is counted or saved, and step 10**9 costs what step 0 costs.

    schedule = build_schedule(planned_stages, tasks, seed)
    schedule(step)             # (task, visit): the step is visit number `visit` of `task`
    schedule.parts(step)       # the same as a list; several entries in mode mixed
    schedule.visits(step)      # task -> visits before `step`
    schedule.ratio(step)       # task -> share of the steps that run it
"""

from pretrain.sampler.schedule import BlockSchedule, MixedSchedule, Schedule
from pretrain.sampler.settings import SamplingSettings, plan_stages
from pretrain.sampler.stages import Stage, build_schedule, ledger_entries, stages_of

__all__ = [
    "BlockSchedule",
    "MixedSchedule",
    "SamplingSettings",
    "Schedule",
    "Stage",
    "build_schedule",
    "ledger_entries",
    "plan_stages",
    "stages_of",
]
