"""The parts of a run on this rank: set up, restore, loop, evaluate, save, report."""

import contextlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from data_pipeline.loader.loader import StepLoader, TaskStream
from data_pipeline.rng import keyed_u64
from data_pipeline.samples.tokenizer import Tokenizer
from pretrain import build
from pretrain.announcement import announce
from pretrain.check_targets import targets_may_miss
from pretrain.data_start import look_at_data
from pretrain.ds_config import engine_config, offloads_optimizer
from pretrain.engine.agreement import Agreement
from pretrain.engine.checkpoint.background_save import BackgroundCheckpoints
from pretrain.engine.checkpoint.copies import Copies
from pretrain.engine.checkpoint.engine_state import fill_masters
from pretrain.engine.checkpoint.saves import Saves
from pretrain.engine.control.control import ControlFolder, StopSignals
from pretrain.engine.control.ownership import Ownership
from pretrain.engine.control.watchdog import Watchdog
from pretrain.engine.data_record import data_entries
from pretrain.engine.hardware import require_hardware
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.loop import Loop, TrainerState, TrainingFailed
from pretrain.engine.memory_pictures import watch_for_out_of_memory
from pretrain.engine.profiler import FOLDER, Profiler
from pretrain.engine.quarantine import Quarantine
from pretrain.engine.report.data_metrics import DataMetrics
from pretrain.engine.report.device_peak import choose_peak
from pretrain.engine.report.metrics_log import MetricsLog, shown
from pretrain.engine.report.own_time import OwnTime
from pretrain.engine.report.start_notes import StartNotes
from pretrain.engine.report.step_report import StepReport
from pretrain.engine.report.throughput import Throughput
from pretrain.engine.run_dir import open_fault_file, record_start
from pretrain.engine.run_record import RunDirError
from pretrain.engine.spikes import SpikeWatch
from pretrain.engine.zero.balance import TaskBalance
from pretrain.engine.zero.ema import Ema
from pretrain.engine.zero.loss_scale import loss_scale_state, restore_loss_scale
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.momentum_pairs import declared_targets, require_weights_in_memory
from pretrain.engine.zero.stale_gradients import require_verified
from pretrain.engine.zero.zero import start_engine
from pretrain.evaluator import Evaluator
from pretrain.optim.schedule import lr_factor
from pretrain.recipe.recipe import Recipe
from pretrain.resume_rules import RECIPE, Turn, way_back
from pretrain.sampler import Schedule, ledger_entries

log = logging.getLogger("omnipretrain.train")


class Trainer:
    """The parts of a run on this rank, and what happens between its steps."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        signals: StopSignals,
        ownership: Ownership,
        watchdog: Watchdog,
        from_step: int | None,
        notes: StartNotes,
    ) -> None:
        self.recipe = recipe
        self.from_step = from_step
        self.ranks = ranks
        self.signals = signals
        self.run_dir = Path(recipe.run_dir)
        self.ownership = ownership
        self.watchdog = watchdog
        self.notes = notes
        self.control = ControlFolder(self.run_dir, ownership)
        self.tokenizer = None
        if recipe.tokenizer is not None:
            self.tokenizer = Tokenizer.load(str(self.run_dir / "tokenizer"))
        self.config = engine_config(recipe, ranks.world)
        stage = self.config["zero_optimization"]["stage"]
        require_verified(len(recipe.tasks), stage, offloads_optimizer(self.config))
        require_hardware(recipe.precision, self.config, ranks.device)
        watch_for_out_of_memory(self.run_dir / FOLDER, ranks.rank, ranks.device)
        self.state = TrainerState()
        self.spikes = SpikeWatch(recipe.failure.spike) if recipe.failure.spike else None
        self.checkpoints = BackgroundCheckpoints(
            self.run_dir / "checkpoints",
            recipe.checkpoint,
            may_commit=ownership.require,
            attachments={
                f"tokenizer/{path.name}": path
                for path in sorted((self.run_dir / "tokenizer").glob("*"))
            }
            | {RECIPE: recipe.to_yaml().encode()},  # not the file, which may be edited
            device=ranks.device,
            limit_s=60 * recipe.failure.save_minutes,
        )
        self.saves = Saves(
            self.checkpoints,
            self.control if ranks.leads else None,
            partial(self._during, "save"),
            self._to_save,
        )
        self.copies = None
        if ranks.leads and recipe.checkpoint.copy_to is not None:
            self.copies = Copies(self.run_dir, recipe.checkpoint, ownership)

    def run(self) -> None:
        """Train to the end of the recipe, or until a stop is asked for."""
        recipe, ranks = self.recipe, self.ranks
        newest = self.checkpoints.newest(self.from_step)
        self.turn = Turn.plan(recipe, newest)
        self.notes.enter("building the model")
        self.engine = start_engine(
            lambda: build.build_model(recipe, self.tokenizer),
            recipe.optimizer,
            self.config,
            recipe.seed,
            ranks.device,
            initial_weights=None if newest else recipe.initial_weights,
        )
        if newest is None and recipe.initial_weights:
            fill_masters(self.engine, Path(recipe.initial_weights))
        self.ema = Ema(self.engine, recipe.ema) if recipe.ema else None
        self.targets = None
        if declared_targets(self.engine.module):
            require_weights_in_memory(self.engine.module, self.config["zero_optimization"])
            self.targets = TargetNetworks(self.engine, recipe.steps)
            if newest is None:
                self.targets.start()
        if newest is not None:
            self.notes.enter(f"restoring {newest.name}")
            with self._during("restore"):
                self._restore(newest)
            self.ownership.require()
            self.turn.take(self.checkpoints, self.state, self.from_step)
        self._settle()
        step = self.state.step
        with (
            MetricsLog(
                self.run_dir,
                ranks.rank,
                step,
                recipe.steps,
                recipe.logging,
                may_write=self.ownership.holds,
                recipe=recipe.to_yaml(),
            ) as self.log,
            open_fault_file(
                self.run_dir, self.ownership, ranks.rank, ranks.world, step
            ) as self.faults,
        ):
            if ranks.leads:
                self.control.status("running", step)
            announce(recipe, ranks, self.engine, self.checkpoints.passed_over, self.turn, newest)
            self.evaluator = Evaluator(
                recipe,
                ranks,
                self.engine,
                self.tokenizer,
                self.log,
                self.faults,
                self.ema,
                self._evaluation_is_to_stop,
                partial(self._during, "evaluate"),
            )
            self._train()

    def _settle(self) -> None:
        """Bring the records of the run up to this start, on rank 0; now that the checkpoint is
        restored, and no earlier: a start that fails before must leave them as they were."""
        if not self.ranks.leads:
            return
        self.ownership.require()
        self.checkpoints.clear_unfinished()
        since = self.ownership.claimed_at  # a rank of this start may have failed already
        for old in self.run_dir.glob("control/failure_rank_*.json"):
            if old.stat().st_mtime < since:
                old.unlink()
        self.recipe.dump(self.run_dir / "recipe.yaml")
        record_start(
            self.run_dir,
            self.ownership,
            world=self.ranks.world,
            zero_stage=self.engine.zero_optimization_stage(),
            device=str(self.ranks.device),
            step=self.state.step,
            deterministic=self.recipe.deterministic,
        )

    def _train(self) -> None:
        recipe, state = self.recipe, self.state
        self.notes.enter("opening shards")
        streams = build.build_streams(recipe, self.tokenizer)
        self.notes.enter("looking at shards and samples")
        look_at_data(recipe, self.ranks, streams, self.tokenizer)
        fingerprints = {name: stream.fingerprint for name, stream in streams.items()}
        with_rows = {name: s for name, s in streams.items() if isinstance(s, TaskStream)}
        state.ledger += data_entries(
            fingerprints,
            {name: stream.reader.shards.known_by_headers for name, stream in with_rows.items()},
            state.ledger,
            state.step,
            lambda task, shards: (
                with_rows[task].fingerprint_by_headers(shards) if task in with_rows else ""
            ),
        )
        self.schedule = schedule = self._schedule(
            {name: stream.n_rows for name, stream in streams.items() if stream.n_rows is not None}
        )
        self.quarantine = Quarantine(self.run_dir, self.ranks, state, with_rows)
        self.agreement = self._agreement(fingerprints)
        peak, said = choose_peak(
            recipe.logging.peak_tflops_per_device, self.ranks.device, recipe.precision
        )
        if said:
            log.info("%s", said)
        self.notes.enter("waiting for the first step")
        self.throughput = Throughput(self.ranks, peak)
        self.profiler = Profiler(
            self.run_dir, self.ranks, self.control, lambda: self.loader.spans()
        )
        loop = Loop(
            self.engine,
            self.ranks,
            recipe.seed,
            (recipe.optimizer.lr, lambda step: lr_factor(step, recipe.schedule, recipe.steps)),
            recipe.failure.max_skipped_steps,
            {name: task.global_batch for name, task in recipe.tasks.items()},
            self.control,
            self.signals,
            schedule.loss_weights,
            self.agreement,
            before_step=TaskBalance(self.engine, recipe.optimizer, schedule.ratio).before_step,
            after_update=self._after_update,
            way_back=lambda step: way_back(recipe, step),
            meant_empty=[n for n, task in recipe.tasks.items() if targets_may_miss(task)],
            is_writing=self.saves.observe,
            when_written=self.saves.written,
            own_time=OwnTime(self.engine.module, self.ranks.device),
            on_profile=self.profiler.begin,
        )
        stopped, self.loader = None, None
        if not self.evaluator.catch_up(state.step):
            stopped = loop.agreed_reason()
        elif state.step < recipe.steps:
            self.loader = StepLoader(
                streams,
                schedule,
                recipe.loader,
                rank=self.ranks.rank,
                world=self.ranks.world,
                start_step=state.step,
                stop_step=recipe.steps,
                pin_memory=self.ranks.device.type == "cuda",
                fault_file=self.faults,
                node_ranks=self.ranks.of_node,
            )
            self.data_metrics = DataMetrics(self.ranks, self.loader)
            self._enter_step()
            try:
                stopped = loop.run(
                    self.loader,
                    state,
                    wants_report=self._wants_report,
                    on_report=self._on_report,
                    after_step=self._after_step,
                )
            except TrainingFailed:  # of all ranks alike; what was begun before is good
                self.saves.wait()
                raise
            self.profiler.close()
        if self.loader is not None and self.saves.step != state.step:
            self._look_after_bad_samples()
        self.saves.finish()
        self.checkpoints.close()
        if self.copies is not None:
            with self._during("save"):
                self.copies.finish(lambda: self.watchdog.enter("save"))
        self.ownership.require()
        if self.ranks.leads:
            self.control.status("stopped" if stopped else "finished", state.step, stopped or "")
        if stopped:
            log.info(
                "stopped after step %d (%s); go on with --resume %s",
                state.step,
                stopped,
                self.run_dir,
            )
        else:
            log.info("finished %d steps; checkpoint %s", state.step, self.run_dir / "checkpoints")

    def _schedule(self, sizes: dict[str, int]) -> Schedule:
        """Which tasks run when; what the ledger says of the past stays, whatever the recipe says.

        sizes: task -> samples of its data, where they are known.
        """
        planned = build.plan_sampling(self.recipe, sizes)
        entries = ledger_entries(planned, self.state.ledger, self.state.step)
        self.state.ledger += entries
        schedule = build.build_schedule(self.recipe, self.state.ledger, sizes)
        if entries and len(self.recipe.tasks) > 1:
            for line in schedule.describe().splitlines():
                log.info("schedule: %s", line)
        return schedule

    def _agreement(self, fingerprints: dict[str, str]) -> Agreement:
        """The check that ranks run the same, on the same data: task -> fingerprint of its data."""
        common = {f"data of {name}": found[:16] for name, found in fingerprints.items()} | {
            "world": str(self.ranks.world),
            "ledger": self._ledger_digest(),
        }
        return Agreement(self.ranks, self.recipe.sampling.check_every_steps, common)

    def _ledger_digest(self) -> str:
        return f"{keyed_u64(json.dumps(self.state.ledger, sort_keys=True)):016x}"

    # ---- between steps ---------------------------------------------------------------------------

    def _wants_report(self, step: int, stops: bool) -> bool:
        # A run that stops before its first line is due has one of its last step; an evaluation may
        # be where the stop is heard.
        early = step + 1 < self.recipe.logging.every_steps
        last = early and (stops or self.evaluator.is_due(step + 1))
        return last or self.log.due(step + 1, self.recipe.steps)

    def _on_report(self, state: TrainerState, report: StepReport) -> None:
        metrics = self.throughput.describe(report)
        metrics |= self.loader.streams[report.task].epochs(state.samples[report.task])
        metrics["skipped_steps"] = state.skipped_steps
        metrics |= self.quarantine.metrics(report.task)
        metrics |= self.data_metrics.describe(report.task)
        self.log.log(state.step, report.task, metrics)
        if self.ranks.leads:
            self.control.name_slow(self.throughput.slow.named())
        self._look_for_a_spike(report.task, metrics["loss"])
        self.status_line = f"{report.task} loss {shown(metrics['loss'], '.4f')}"

    def _look_for_a_spike(self, task: str, loss: float | None) -> None:
        said = self.spikes.observe(task, self.state.step, loss) if self.spikes else None
        if said is None:
            return
        if self.recipe.failure.spike.action == "stop":
            raise TrainingFailed(
                f"{said}; resume from a checkpoint before it (--from-step N) with a lower "
                "optimizer.lr, or with failure.spike.action=warn"
            )
        log.warning("%s", said)

    def _after_update(self, update: int) -> None:
        if self.ema is not None:
            self.ema.update(update)
        if self.targets is not None:
            self.targets.update(update)

    def _after_step(self, state: TrainerState, save_asked: bool) -> bool:
        self.notes.close()
        self.profiler.after_step(state.step)
        self.log.progress(state.step, getattr(self, "status_line", ""))
        whole = self.evaluator.evaluate_if_due(state.step)
        if self.saves.due(state.step, save_asked):
            self._look_after_bad_samples()
            self.saves.save(save_asked)
        if self.copies is not None:
            self.copies.look()
        self.watchdog.enter("step", state.step)
        return not whole

    def _enter_step(self) -> None:
        self.watchdog.enter("step", self.state.step)
        if self.ranks.leads:
            self.control.enter("step")

    @contextlib.contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """Within, the watchdog and the status know the run in this phase."""
        said = self.control.during(phase) if self.ranks.leads else contextlib.nullcontext()
        with self.watchdog.during(phase), said:
            yield

    def _evaluation_is_to_stop(self) -> bool:
        self.watchdog.enter("evaluate")  # another batch: it gets on
        stop = self.signals.received is not None
        if self.ranks.leads:
            self.control.beat()
            stop = stop or self.ownership.lost or self.control.stop_requested() is not None
        return stop

    def _look_after_bad_samples(self) -> None:
        """Before a checkpoint, which has to hold what ranks agree on: see `engine.quarantine`."""
        faults, planned = self.loader.take_faults(), self.recipe.checkpoint.every_steps
        if not self.recipe.loader.quarantine:
            return
        self.quarantine.gather(faults)
        if self.state.step % planned == 0:  # at the last step too: the run may be made longer
            visits = self.schedule.visits(self.state.step)
            samples = {n: v * self.recipe.tasks[n].global_batch for n, v in visits.items()}
            if self.quarantine.revise(samples):
                self.agreement.common["ledger"] = self._ledger_digest()
                if self.state.step < self.recipe.steps:
                    self.loader.restart()
        if self.ownership.holds():
            self.quarantine.write_list()

    # ---- checkpoints -----------------------------------------------------------------------------

    def _to_save(self) -> dict:
        """Arguments of `Checkpoints.save`."""
        trainer = {
            **vars(self.state),
            "tokenizer": self._tokenizer_digest(),
            "seed": self.recipe.seed,
            "loss_scale": loss_scale_state(self.engine),
        }
        return {
            "engine": self.engine,
            "step": self.state.step,
            "trainer": trainer,
            "averages": self._averages(),
            "targets": self.targets,
        }

    def _restore(self, folder: Path) -> None:
        restored = self.checkpoints.restore(self.engine, folder, self._averages(), self.targets)
        trainer = dict(restored.trainer)
        digest, seed = trainer.pop("tokenizer"), trainer.pop("seed")
        restore_loss_scale(self.engine, trainer.pop("loss_scale"))
        if digest != self._tokenizer_digest():
            raise RunDirError(
                f"the tokenizer in {self.run_dir / 'tokenizer'} is not the one that {folder.name} "
                f"was trained with; put the files of {folder / 'tokenizer'} back"
            )
        if seed != self.recipe.seed:
            raise RunDirError(
                f"{folder.name} belongs to seed {seed}, the recipe in {self.run_dir} says "
                f"{self.recipe.seed}: the data order would change"
            )
        self.state = TrainerState(**trainer)
        self.saves.step = self.state.step

    def _tokenizer_digest(self) -> str | None:
        return self.tokenizer.digest if self.tokenizer else None

    def _averages(self) -> list[torch.Tensor] | None:
        return self.ema.tensors if self.ema else None
