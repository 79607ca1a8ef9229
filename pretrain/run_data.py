"""What a run reads: the data of its tasks, the schedule that deals steps to them, and what leaves.

All of it is a function of the recipe and of the run's ledger, which grows here: by data that were
opened, by a schedule that changed, by samples that are left out.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from data_pipeline.loader.faults import FaultFile
from data_pipeline.loader.loader import StepLoader, TaskStream
from data_pipeline.rng import keyed_u64
from data_pipeline.samples.tokenizer import Tokenizer
from pretrain import build
from pretrain.data_start import look_at_data
from pretrain.engine.agreement import Agreement
from pretrain.engine.data_record import data_entries
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.loop import TrainerState
from pretrain.engine.quarantine import Quarantine
from pretrain.recipe.recipe import Recipe
from pretrain.sampler import Schedule, ledger_entries

log = logging.getLogger("omnipretrain.train")


class RunData:
    """Opens the data of all tasks, looks at them, and plans who reads what. A collective.

    Args:
        state: of the run, whose ledger is read and gets entries.
        enter: is told what the start is doing.

    Raises:
        DataFault: the data are not what the recipe or their indices say.
        RunDirError: they are not those that the run was trained on.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        tokenizer: Tokenizer | None,
        state: TrainerState,
        enter: Callable[[str], None],
    ) -> None:
        self.recipe, self.ranks, self.state = recipe, ranks, state
        enter("opening shards")
        self.streams = build.build_streams(recipe, tokenizer)
        enter("looking at shards and samples")
        look_at_data(recipe, ranks, self.streams, tokenizer)
        fingerprints = {name: stream.fingerprint for name, stream in self.streams.items()}
        with_rows = {name: s for name, s in self.streams.items() if isinstance(s, TaskStream)}
        state.ledger += data_entries(
            fingerprints,
            {name: stream.reader.shards.known_by_headers for name, stream in with_rows.items()},
            state.ledger,
            state.step,
            lambda task, shards: (
                with_rows[task].fingerprint_by_headers(shards) if task in with_rows else ""
            ),
        )
        self.schedule = self._schedule()
        self.quarantine = Quarantine(Path(recipe.run_dir), ranks, state, with_rows)
        common = {f"data of {name}": found[:16] for name, found in fingerprints.items()} | {
            "world": str(ranks.world),
            "ledger": self._ledger_digest(),
        }
        self.agreement = Agreement(ranks, recipe.sampling.check_every_steps, common)

    def _schedule(self) -> Schedule:
        """Which tasks run when. What ran in the past says the ledger, whatever the recipe says."""
        sizes = {
            n: stream.n_rows for n, stream in self.streams.items() if stream.n_rows is not None
        }
        planned = build.plan_sampling(self.recipe, sizes)
        entries = ledger_entries(planned, self.state.ledger, self.state.step)
        self.state.ledger += entries
        schedule = build.build_schedule(self.recipe, self.state.ledger, sizes)
        if entries and len(self.recipe.tasks) > 1:
            for line in schedule.describe().splitlines():
                log.info("schedule: %s", line)
        return schedule

    def loader(self, fault_file: FaultFile | None) -> StepLoader:
        """Batches from the state's step to the last one of the recipe."""
        return StepLoader(
            self.streams,
            self.schedule,
            self.recipe.loader,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start_step=self.state.step,
            stop_step=self.recipe.steps,
            pin_memory=self.ranks.device.type == "cuda",
            fault_file=fault_file,
            node_ranks=self.ranks.of_node,
        )

    def look_after_bad_samples(self, loader: StepLoader, may_write: Callable[[], bool]) -> None:
        """Before a checkpoint, which has to hold what ranks agree on: see `engine.quarantine`."""
        faults, planned = loader.take_faults(), self.recipe.checkpoint.every_steps
        if not self.recipe.loader.quarantine:
            return
        self.quarantine.gather(faults)
        if self.state.step % planned == 0:  # at the last step too: the run may be made longer
            visits = self.schedule.visits(self.state.step)
            samples = {n: v * self.recipe.tasks[n].global_batch for n, v in visits.items()}
            if self.quarantine.revise(samples):
                self.agreement.common["ledger"] = self._ledger_digest()
                if self.state.step < self.recipe.steps:
                    loader.restart()
        if may_write():
            self.quarantine.write_list()

    def _ledger_digest(self) -> str:
        return f"{keyed_u64(json.dumps(self.state.ledger, sort_keys=True)):016x}"
