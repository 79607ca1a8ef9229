"""The training loop: the same task, or the same mixture of tasks, on every rank in every step.

The loop knows no objective, no model and no data format. A step is a `StepBatch` from the loader:
the micro-batches of one task's global batch that fall to this rank (of several tasks' batches, if
the schedule mixes them). Whatever ranks must agree on (the counts that scale the losses, requests
to stop or save, now and then what it is that they run) travels in one all-reduce a step.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist

from data_pipeline.rng import keyed_u64
from pretrain.engine.agreement import LENGTH, Agreement
from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.ownership import OwnershipLost
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.report.counted import TargetWatch, has_targets, with_absences
from pretrain.engine.report.own_time import OwnTime
from pretrain.engine.report.step_report import StepReport
from pretrain.engine.zero.update_size import mean_square_share
from pretrain.engine.zero.zero import TaskBatch, accumulate_parts, set_learning_rate, to_device

log = logging.getLogger("omnipretrain.loop")

# The agreed vector has the same length for (almost) any tasks: ranks that disagree on what to run
# must at least meet in the all-reduce that tells them so.
_COUNT_SLOTS = 64
_FLAGS = 5  # stop, save, profile, run directory lost, a checkpoint is being written


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class TrainerState:
    """All that a run knows beyond its recipe and its step. JSON in every checkpoint."""

    step: int = 0
    """Optimizer steps taken, skipped ones included: the position of every data stream."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite, since the run began."""
    skipped_in_a_row: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    """Samples of each task that steps have consumed."""
    ledger: list[dict] = field(default_factory=list)
    """What no function of (seed, step) can know; append-only."""
    bad_rows: dict[str, list[list[int]]] = field(default_factory=dict)
    """Task -> ranges of rows that were bad and that no entry of the ledger names yet."""
    quarantine_edits: int = 0
    """Lines of `quarantine_edits.jsonl` that the ledger has taken in."""


class Loop:
    """Runs the steps of a run and calls back for everything that is not a step.

    Args:
        engine: DeepSpeed engine whose module is a `MultiTaskModel`.
        ranks: this process.
        seed: the run's seed.
        learning_rate: (base, factor of a step) of the schedule.
        max_skipped_in_a_row: so many steps with a non-finite gradient in a row end the run.
        global_batches: task -> samples of one step.
        control: control files; read and written on rank 0 only.
        signals: flags set by signals on this rank.
        loss_weights: step -> task -> factor of its loss; several tasks of a step are accumulated
            into one optimizer step on sum_k w_k loss_k. None = 1.
        agreement: the check that all ranks run the same; None = one with its defaults.
        before_step: called with (step, task) before the forward pass of a step of one task.
        after_update: called after each optimizer step that changed the weights, with the number of
            such steps before it.
        way_back: first of the steps that were skipped in a row -> what to do, as the end of a
            sentence.
        meant_empty: tasks of whose missing targets nothing is said.
        is_writing: whether this rank is still writing a checkpoint; asked at each step.
        when_written: called after each step at which no rank was, on every rank.
        own_time: clocks a forward pass of the steps that are reported; None = nothing is clocked.
        on_profile: called on every rank with the steps taken, after each step in which a trace of
            the next ones is asked for.
    """

    def __init__(
        self,
        engine,
        ranks: Ranks,
        seed: int,
        learning_rate: tuple[float, Callable[[int], float]],
        max_skipped_in_a_row: int,
        global_batches: Mapping[str, int],
        control: ControlFolder,
        signals: StopSignals,
        loss_weights: Callable[[int], Mapping[str, float]] | None = None,
        agreement: Agreement | None = None,
        before_step: Callable[[int, str], None] = lambda step, task: None,
        after_update: Callable[[int], None] = lambda update: None,
        way_back: Callable[[int], str] = lambda step: "lower optimizer.lr",
        meant_empty: Collection[str] = (),
        is_writing: Callable[[], bool] = lambda: False,
        when_written: Callable[[], None] = lambda: None,
        own_time: OwnTime | None = None,
        on_profile: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.seed = seed
        self.base_rate, self.rate_factor = learning_rate
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.global_batches = global_batches
        self.control = control
        self.signals = signals
        self.loss_weights = loss_weights
        self.agreement = agreement or Agreement(ranks, every_steps=100)
        self.before_step = before_step
        self.after_update = after_update
        self.way_back = way_back
        self.targets = TargetWatch(ranks.leads, meant_empty)
        self.is_writing, self.when_written = is_writing, when_written
        self.own_time, self.on_profile = own_time, on_profile
        self._begin_mark = time.perf_counter()

    def run(
        self,
        step_batches: Iterable,
        state: TrainerState,
        *,
        wants_report: Callable[[int, bool], bool],
        on_report: Callable[[TrainerState, StepReport], None],
        after_step: Callable[[TrainerState, bool], bool | None],
    ) -> str | None:
        """Take one step for each of `step_batches`, until they end or somebody asks to stop.

        Args:
            step_batches: from step `state.step` on.
            state: updated in place.
            wants_report: (step, whether the run stops with it) -> whether its metrics are reduced
                and reported; the same on all ranks.
            on_report: receives the reports, one per task of a step, on every rank.
            after_step: (state, save asked for) after every step, on every rank; returns whether
                all ranks have agreed meanwhile to stop.

        Returns:
            Why the run was stopped, or None when they ended.

        Raises:
            TrainingFailed: too many steps in a row had a non-finite gradient.
            OwnershipLost: on every rank, if another job has taken the run directory.
            RanksDisagree: on every rank, if they do not run the same.
        """
        self._begin_mark = time.perf_counter()
        for step_batch in step_batches:
            reports, requests = self._step(step_batch, state, wants_report)
            if self.ranks.leads:
                self.control.beat()
            for report in reports:
                on_report(state, report)
            self._check_skips(state)
            stop, save, profile, writing = requests
            if not writing:
                self.when_written()
            stop = after_step(state, save) or stop
            if profile and not stop:
                self.on_profile(state.step)
            if stop:
                return self.agreed_reason()
        return None

    # ---- one step ------------------------------------------------------------------------------

    def _step(
        self, step_batch, state: TrainerState, wants_report: Callable[[int, bool], bool]
    ) -> tuple[list[StepReport], tuple]:
        waited = time.perf_counter()
        totals, agreed = self._agree(step_batch)
        # Element-wise draws (dropout) belong to (seed, step, rank): a resume repeats them.
        torch.manual_seed(keyed_u64(self.seed, "dropout", step_batch.step, self.ranks.rank) >> 1)
        rate = self.rate_factor(step_batch.step)
        set_learning_rate(self.engine, self.base_rate, rate)
        # MT-AdamW weighs an update by its task; a step of several parts has no one task.
        if len(step_batch.parts) == 1:
            self.before_step(step_batch.step, step_batch.parts[0].task)
        weights = self._weights(step_batch)
        clocked = self.own_time if wants_report(step_batch.step, False) else None
        with clocked or contextlib.nullcontext():
            shares = accumulate_parts(
                self.engine,
                [
                    self._task_batch(part, totals, weights, step_batch.step)
                    for part in step_batch.parts
                ],
            )
        applied = self.engine.was_step_applied()
        if applied:
            self.after_update(state.step - state.skipped_steps)
        self._count(step_batch, state, applied)
        # Here the host waits until the device has stepped: `seconds` are those of the whole step,
        # and ZeRO-3, whose gathering stream waits for no other, finds weights that are written.
        stop, save, profile, lost, writing, *sums = agreed.tolist()
        if lost > 0:
            self._leave_lost_run()
        requests = stop > 0, save > 0, profile > 0, writing > 0
        counts, taught = _by_task(totals, sums), False
        for part in step_batch.parts:
            objective = self.engine.module.objectives[part.task]
            self.targets.observe(state.step, part.task, objective, counts[part.task])
            taught = taught or has_targets(objective, counts[part.task])
        now = time.perf_counter()
        seconds = {**step_batch.seconds, "wait": waited - self._begin_mark, "step": now - waited}
        seconds["total"] = now - self._begin_mark
        data_s = step_batch.seconds.get("wait", 0.0)  # without what rank 0 writes between steps
        seconds["own"] = data_s + (clocked.seconds() if clocked else 0.0)
        self._begin_mark = now
        if not wants_report(step_batch.step, stop > 0):
            return [], requests
        if applied and (size := mean_square_share(self.engine, self.ranks.device)) is not None:
            shares[""] = {"update_size": size}
        metrics = self._reduce(shares)
        common = {
            "gradient_norm": float(self.engine.get_global_grad_norm()) if taught else None,
            "learning_rate": self.base_rate * rate,
            "skipped": float(not applied),
        }
        if "" in metrics:  # of the step, whatever its tasks
            common["update_rms"] = metrics.pop("")["update_size"] ** 0.5
        return [
            StepReport(
                part.task,
                with_absences(
                    self.engine.module.objectives[part.task], metrics[part.task], counts[part.task]
                )
                | common
                | self._sizes(part, weights),
                seconds,
            )
            for part in step_batch.parts
        ], requests

    def _count(self, step_batch, state: TrainerState, applied: bool) -> None:
        """Move the state behind a step that was taken or skipped."""
        state.step = step_batch.step + 1
        state.skipped_steps += not applied
        state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
        for part in step_batch.parts:
            samples = state.samples.get(part.task, 0) + self.global_batches[part.task]
            state.samples[part.task] = samples

    def _task_batch(self, part, totals: Mapping, weights: Mapping, step: int) -> TaskBatch:
        micro_batches = self._on_device(part)
        return TaskBatch(part.task, micro_batches, totals[part.task], weights[part.task], step)

    def _on_device(self, part) -> list[dict]:
        """The micro-batches, with what their objective adds while they are on the CPU."""
        prepare = self.engine.module.objectives[part.task].prepare
        return [
            to_device({**batch, **prepare(batch)}, self.ranks.device)
            for batch in part.micro_batches
        ]

    def _weights(self, step_batch) -> Mapping[str, float]:
        if self.loss_weights is None:
            return {part.task: 1.0 for part in step_batch.parts}
        return self.loss_weights(step_batch.step)

    def _sizes(self, part, weights: Mapping[str, float]) -> dict[str, float]:
        objective = self.engine.module.objectives[part.task]
        sizes = {
            "samples": self.global_batches[part.task],
            "flops": sum(objective.flops(batch) for batch in part.micro_batches),
        }
        weight = weights[part.task]
        return sizes if weight == 1.0 else sizes | {"loss_weight": weight}

    def _agree(self, step_batch) -> tuple[dict[str, dict[str, torch.Tensor]], torch.Tensor]:
        """Sum over all ranks: the counts of each part, flags (`_FLAGS`), the check.

        Returns:
            task -> count -> its sum, 0-dim float32 on the device; and the flags and the same sums
            in the order of `_by_task`, for the host when it waits for the device anyway.
        """
        counts: dict[tuple[str, str], int] = {}
        for part in step_batch.parts:
            objective = self.engine.module.objectives[part.task]
            for batch in part.micro_batches:
                for name, count in objective.counts(batch).items():
                    counts[part.task, name] = counts.get((part.task, name), 0) + count
        stop = self.signals.received is not None
        save = profile = lost = False
        if self.ranks.leads:
            stop = stop or self.control.stop_requested() is not None
            save = self.control.save_requested()
            profile = self.control.profile_requested()
            lost = self.control.ownership.lost
        names = sorted(counts)
        checked = self.agreement.due()
        check = self.agreement.numbers(step_batch) if checked else [0] * LENGTH
        spare = [0] * (-len(names) % _COUNT_SLOTS)
        values = torch.tensor(
            [
                *check,
                stop,
                save,
                profile,
                lost,
                self.is_writing(),
                *(counts[n] for n in names),
                *spare,
            ],
            dtype=torch.float64,
            device=self.ranks.device,
        )
        dist.all_reduce(values)
        if checked:
            self.agreement.check(step_batch, values[:LENGTH].tolist())
        totals: dict[str, dict[str, torch.Tensor]] = {part.task: {} for part in step_batch.parts}
        summed = values[LENGTH + _FLAGS :].float().unbind()
        for (task, name), total in zip(names, summed, strict=False):
            totals[task][name] = total
        return totals, values[LENGTH : LENGTH + _FLAGS + len(names)]

    def _reduce(
        self, shares: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, float]]:
        names = sorted((task, name) for task, own in shares.items() for name in own)
        values = torch.stack([shares[task][name].double() for task, name in names])
        dist.all_reduce(values)
        reduced: dict[str, dict[str, float]] = {task: {} for task in shares}
        for (task, name), value in zip(names, values.tolist(), strict=True):
            reduced[task][name] = value
        return reduced

    # ---- conditions ----------------------------------------------------------------------------

    def _check_skips(self, state: TrainerState) -> None:
        if not state.skipped_in_a_row:
            return
        log.warning(
            "step %d was skipped: its gradient is not finite (%d in a row, %d in all)",
            state.step - 1,
            state.skipped_in_a_row,
            state.skipped_steps,
        )
        if state.skipped_in_a_row > self.max_skipped_in_a_row:
            raise TrainingFailed(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step - 1} had a "
                "non-finite gradient and were skipped (failure.max_skipped_steps = "
                f"{self.max_skipped_in_a_row}); "
                + self.way_back(state.step - state.skipped_in_a_row)
            )

    def _leave_lost_run(self) -> NoReturn:
        self.control.ownership.require()
        raise OwnershipLost("rank 0 found that another job has taken over this run")

    def agreed_reason(self) -> str:
        """The reason to stop, from whichever rank knows one. A collective."""
        mine = self.signals.received
        if self.ranks.leads and mine is None:
            mine = self.control.stop_requested()
        reasons: list = [None] * self.ranks.world
        dist.all_gather_object(reasons, mine)
        return next((reason for reason in reasons if reason), "stop requested")


def _by_task(
    totals: Mapping[str, Mapping[str, torch.Tensor]], sums: list[float]
) -> dict[str, dict[str, float]]:
    """Task -> count -> sum, of sums in the order of the sorted (task, count)."""
    found: dict[str, dict[str, float]] = {task: {} for task in totals}
    names = sorted((task, name) for task, own in totals.items() for name in own)
    for (task, name), value in zip(names, sums, strict=True):
        found[task][name] = value
    return found
