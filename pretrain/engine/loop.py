"""The training loop: one task per optimizer step, the same one on every rank.

The loop knows no objective, no model and no data format. A step is a `StepWindow` from the loader:
the micro-batches of one task's global batch that fall to this rank. Whatever ranks must agree on
(the counts that scale the loss, requests to stop or save) travels in one all-reduce a step.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from data_pipeline.rng import keyed_u64
from pretrain.engine.control import ControlFolder, StopSignals
from pretrain.engine.distributed import Ranks
from pretrain.engine.update_size import mean_square_share
from pretrain.engine.zero import accumulate_and_step, set_learning_rate, to_device

log = logging.getLogger("omnipretrain.loop")


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


@dataclass
class StepReport:
    """One step as it is logged: `metrics` are global values, `seconds` this rank's times."""

    task: str
    metrics: dict[str, float]
    seconds: dict[str, float]


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
        before_step: called with (step, task) before a step's forward pass.
        after_update: called after each optimizer step that changed the weights, with the number of
            such steps before it.
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
        before_step: Callable[[int, str], None] = lambda step, task: None,
        after_update: Callable[[int], None] = lambda update: None,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.seed = seed
        self.base_rate, self.rate_factor = learning_rate
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.global_batches = global_batches
        self.control = control
        self.signals = signals
        self.before_step = before_step
        self.after_update = after_update
        self._begin_mark = time.perf_counter()

    def run(
        self,
        windows: Iterable,
        state: TrainerState,
        *,
        wants_report: Callable[[int, str], bool],
        on_report: Callable[[TrainerState, StepReport], None],
        after_step: Callable[[TrainerState, bool], None],
    ) -> str | None:
        """Take one step per window until the windows end or somebody asks to stop.

        Args:
            windows: `StepWindow`s from step `state.step` on.
            state: updated in place.
            wants_report: (step, task) -> whether this step's metrics are reduced and reported.
            on_report: receives the reports, on every rank.
            after_step: (state, save asked for) after every step, on every rank.

        Returns:
            Why the run was stopped, or None when the windows ended.

        Raises:
            TrainingFailed: too many steps in a row had a non-finite gradient.
        """
        self._begin_mark = time.perf_counter()
        for window in windows:
            report, requests = self._step(window, state, wants_report(window.step, window.task))
            if report:
                on_report(state, report)
            self._check_skips(state)
            if self.ranks.leads:
                self.control.beat()
            stop, save = requests
            after_step(state, save)
            if stop:
                return self._agreed_reason()
        return None

    # ---- one step ------------------------------------------------------------------------------

    def _step(self, window, state: TrainerState, report: bool) -> tuple[StepReport | None, tuple]:
        waited = time.perf_counter()
        objective = self.engine.module.objectives[window.task]
        totals, requests = self._agree(objective, window.micro_batches)
        # Element-wise draws (dropout) belong to (seed, step, rank): a resume repeats them.
        torch.manual_seed(keyed_u64(self.seed, "dropout", window.step, self.ranks.rank) >> 1)
        rate = self.rate_factor(window.step)
        set_learning_rate(self.engine, self.base_rate, rate)
        self.before_step(window.step, window.task)
        batches = [to_device(batch, self.ranks.device) for batch in window.micro_batches]
        shares = accumulate_and_step(self.engine, window.task, batches, totals)
        applied = self.engine.was_step_applied()
        if applied:
            self.after_update(state.step - state.skipped_steps)
        state.step = window.step + 1
        state.skipped_steps += not applied
        state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
        samples = self.global_batches[window.task]
        state.samples[window.task] = state.samples.get(window.task, 0) + samples
        # After engine.step() the host has waited for the device, so these reads cost nothing.
        stop, save = (bool(flag > 0) for flag in requests.tolist())
        now = time.perf_counter()
        seconds = {**window.seconds, "wait": waited - self._begin_mark, "step": now - waited}
        seconds["total"] = now - self._begin_mark
        self._begin_mark = now
        if not report:
            return None, (stop, save)
        metrics = self._reduce(self._with_update_size(shares) if applied else shares)
        if "update_rms" in metrics:
            metrics["update_rms"] **= 0.5
        metrics |= {
            "gradient_norm": float(self.engine.get_global_grad_norm()),
            "learning_rate": self.base_rate * rate,
            "skipped": float(not applied),
            "samples": samples,
            "flops": sum(objective.flops(batch) for batch in window.micro_batches),
        }
        return StepReport(window.task, metrics, seconds), (stop, save)

    def _agree(self, objective, micro_batches) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Sum the objective's counts and the requests to stop and save over all ranks."""
        counts: dict[str, int] = {}
        for batch in micro_batches:
            for name, count in objective.count(batch).items():
                counts[name] = counts.get(name, 0) + count
        stop = self.signals.received is not None
        save = False
        if self.ranks.leads:
            stop = stop or self.control.stop_requested() is not None
            save = self.control.save_requested()
        names = sorted(counts)
        values = torch.tensor(
            [*(counts[name] for name in names), stop, save],
            dtype=torch.float64, device=self.ranks.device,
        )
        dist.all_reduce(values)
        totals = values[:-2].float()
        return dict(zip(names, totals.unbind(), strict=True)), values[-2:]

    def _with_update_size(self, shares: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mean_square = mean_square_share(self.engine, self.ranks.device)
        return {**shares} if mean_square is None else {**shares, "update_rms": mean_square}

    def _reduce(self, shares: Mapping[str, torch.Tensor]) -> dict[str, float]:
        names = sorted(shares)
        values = torch.stack([shares[name].double() for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    # ---- conditions ----------------------------------------------------------------------------

    def _check_skips(self, state: TrainerState) -> None:
        if not state.skipped_in_a_row:
            return
        log.warning(
            "step %d was skipped: its gradient is not finite (%d in a row, %d in all)",
            state.step - 1, state.skipped_in_a_row, state.skipped_steps,
        )
        if state.skipped_in_a_row > self.max_skipped_in_a_row:
            raise TrainingFailed(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step - 1} had a "
                "non-finite gradient and were skipped (failure.max_skipped_steps = "
                f"{self.max_skipped_in_a_row}); resume from an earlier checkpoint with a lower "
                "learning rate, or look at the data of these steps (logs/)"
            )

    def _agreed_reason(self) -> str:
        """The reason to stop, from whichever rank knows one."""
        mine = self.signals.received
        if self.ranks.leads and mine is None:
            mine = self.control.stop_requested()
        reasons: list = [None] * self.ranks.world
        dist.all_gather_object(reasons, mine)
        return next((reason for reason in reasons if reason), "stop requested")
