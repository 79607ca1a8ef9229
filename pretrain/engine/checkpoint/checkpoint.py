"""Writing and restoring checkpoints: all ranks together, whole or not at all.

Every rank writes its fp32 partitions and optimizer states beside a map of fragments; rank 0 seals a
manifest of sizes and hashes and renames the folder into place. Because the map names every
fragment, any number of ranks and any ZeRO stage can read it (`files.FragmentReader`).
Why not DeepSpeed's own files: they are pickles, not crash-safe, unchecked, and tied to one world.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.files import naming, sync_file, sync_folder, write_atomically
from pretrain.engine.checkpoint.contents import Contents, rank_contents, write_contents
from pretrain.engine.checkpoint.engine_state import (
    check_parameters,
    describe_parameters,
    load_module_tensors,
    module_tensors,
    set_scalar,
    sources_of,
    state_to_fill,
)
from pretrain.engine.checkpoint.files import (
    EMA,
    FORMAT,
    MANIFEST,
    MASTER,
    CheckpointError,
    FragmentReader,
    checkpoint_name,
    list_checkpoints,
    read_full_state,
    read_manifest,
    seal_manifest,
    verify_file,
)
from pretrain.engine.checkpoint.retention import (
    Aside,
    find_checkpoint,
    remove,
    retire,
    set_aside,
    steps_there,
    went_back_from,
)
from pretrain.engine.checkpoint.settings import CheckpointSettings
from pretrain.engine.control.failures import reason_of
from pretrain.engine.control.ownership import OwnershipLost
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.partitions import (
    list_partitions,
    push_masters_to_module,
)

__all__ = ["CheckpointError", "CheckpointSettings", "Checkpoints", "read_full_state"]
log = logging.getLogger("omnipretrain.checkpoint")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says beside the tensors: its step and the trainer's own state."""

    folder: Path
    step: int
    trainer: dict


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written: where, its name when it is whole, and its manifest but
    for the files."""

    temporary: Path
    final: Path
    manifest: dict


class Checkpoints:
    """The checkpoints of one run, written and read by all ranks together.

    Args:
        root: folder of the checkpoints; all ranks must see the same one.
        settings: retention.
        may_commit: called on rank 0 before a checkpoint becomes visible; raises if this job no
            longer owns the run.
        attachments: files kept inside every checkpoint: name -> source, or content.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointSettings,
        may_commit: Callable[[], None] = lambda: None,
        attachments: dict[str, Path | bytes] | None = None,
    ) -> None:
        self.root = root
        self.settings = settings
        self._may_commit = may_commit
        self._attachments = attachments or {}
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()
        self.passed_over: list[str] = []

    # ---- writing -----------------------------------------------------------------------------

    def save(
        self,
        engine,
        step: int,
        trainer: dict,
        averages: list[torch.Tensor] | None = None,
        targets: TargetNetworks | None = None,
    ) -> Path:
        """Write the checkpoint after `step` steps. A collective; returns once it is durable.

        Args:
            engine: the DeepSpeed engine (ZeRO 1, 2 or 3).
            step: optimizer steps taken.
            trainer: JSON-serialisable state of the loop (ledger, counters).
            averages: moving average of each partition (`engine.zero.ema.Ema.tensors`).
            targets: momentum targets, if objectives have some.

        Raises:
            CheckpointError: on every rank, if any rank could not write; nothing is left behind.
        """
        saving = self._open(engine, step, trainer, targets)
        module = module_tensors(engine, sources_of(targets))  # a collective under ZeRO-3
        entries = self._agree(
            lambda: write_contents(
                self._contents(engine, module, averages, targets), saving.temporary
            ),
            saving.temporary,
        )
        self._agree_on(lambda: self._commit(saving, entries), saving.temporary)
        return saving.final

    def clear_unfinished(self) -> None:
        """Take away what saves and removals that were cut off have left; for rank 0."""
        self._may_commit()  # or it would clear away what the new owner is writing
        for stale in [*self.root.glob(".writing-*"), *self.root.glob(".removing-*")]:
            shutil.rmtree(stale, ignore_errors=True)

    def _open(self, engine, step: int, trainer: dict, targets: TargetNetworks | None) -> Saving:
        final = self.root / checkpoint_name(step)
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": self._world,
            "zero_stage": engine.zero_optimization_stage(),
            "trainer": json.loads(json.dumps(trainer)),  # a copy: training goes on
            **describe_parameters(engine, sources_of(targets)),
        }
        return Saving(self._agree_on(lambda: self._open_temporary(final)), final, manifest)

    def _open_temporary(self, final: Path) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        self.clear_unfinished()
        temporary = self.root / f".writing-{final.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
        return temporary

    def _contents(self, engine, module, averages, targets) -> Contents:
        return rank_contents(engine, self._rank, module, averages, targets, self._attachments)

    def _commit(self, saving: Saving, entries: list[dict[str, dict]]) -> None:
        """Make a checkpoint visible, on rank 0: before the rename there is none of this name,
        after it there is a whole one, and `latest` moves last."""
        temporary, final, manifest = saving.temporary, saving.final, saving.manifest
        files = {name: entry for rank in entries for name, entry in rank.items()}
        with naming(temporary / MANIFEST):
            (temporary / MANIFEST).write_bytes(seal_manifest({**manifest, "files": files}))
        sync_file(temporary / MANIFEST)
        sync_folder(temporary)
        self._may_commit()
        if final.exists():  # a damaged one of the same step, which this run fell back from
            remove(final)
        os.rename(temporary, final)
        sync_folder(self.root)
        write_atomically(self.root / "latest", [f"{final.name}\n".encode()])
        sound = manifest["step"] - manifest["trainer"].get("skipped_in_a_row", 0)
        retire(self.root, self.settings.keep_last, self.settings.keep_every_steps, sound)

    # ---- reading -----------------------------------------------------------------------------

    def newest(self, step: int | None = None) -> Path | None:
        """The newest checkpoint whose every byte is as written. A collective.

        Damaged ones are passed over, and what is wrong with them stands in `passed_over`.

        Args:
            step: only the checkpoint of this step will do; None = any.

        Raises:
            CheckpointError: there are checkpoints, but none is whole; or there were some.
        """
        candidates = self._agree_on(
            self._candidates if step is None else lambda: [find_checkpoint(self.root, step)]
        )
        self.passed_over = []
        for folder in candidates:
            problems = self._verify(folder)
            if not problems:
                return folder
            self.passed_over += [f"{folder.name} is passed over: {p}" for p in problems]
        if step is not None:
            raise CheckpointError(
                f"{candidates[0]} is not whole: choose another step with --from-step "
                f"({steps_there(self.root)}): " + "; ".join(self.passed_over)
            )
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints under {self.root} is whole; restore "
                "one from a backup, or start in a new run_dir: " + "; ".join(self.passed_over)
            )
        return None

    def _candidates(self) -> list[Path]:
        found, latest = list_checkpoints(self.root), self.root / "latest"
        if not found and latest.exists():  # or the run would begin again, over its own record
            named = latest.read_text(encoding="utf-8").strip()
            raise CheckpointError(
                f"{latest} names {named}, but no checkpoint is there now: bring it back, or start "
                "in a new run_dir"
            )
        return found

    def _verify(self, folder: Path) -> list[str]:
        def mine() -> list[str]:
            try:
                manifest = read_manifest(folder)
            except CheckpointError as error:
                return [str(error)] if self._rank == 0 else []
            names = sorted(manifest["files"])[self._rank :: self._world]
            return [p for n in names if (p := verify_file(folder, n, manifest["files"][n]))]

        return [problem for rank in self._agree(mine) for problem in rank]

    def restore(
        self,
        engine,
        folder: Path,
        averages: list[torch.Tensor] | None = None,
        targets: TargetNetworks | None = None,
    ) -> Restored:
        """Fill the engine's weights and optimizer states from a checkpoint. A collective.

        Works at any world size and ZeRO stage; at the one that wrote it, bit for bit. Every rank
        reads the ranges of its own partitions, straight into them.

        Args:
            averages: filled with the moving average, as `save` had it; None = not wanted.
            targets: momentum targets to fill, as `save` had them.

        Raises:
            CheckpointError: on every rank, if names or shapes differ from the model's (all named).
        """
        opened: list[FragmentReader] = []  # stays here: only plain results travel between ranks
        self._agree(lambda: opened.append(self._fill_partitions(engine, folder, averages, targets)))
        (reader,) = opened
        load_module_tensors(engine, reader)
        push_masters_to_module(engine)
        if targets is not None:
            targets.push()
        return Restored(folder, reader.manifest["step"], reader.manifest["trainer"])

    def _fill_partitions(
        self,
        engine,
        folder: Path,
        averages: list[torch.Tensor] | None,
        targets: TargetNetworks | None,
    ) -> FragmentReader:
        reader = FragmentReader(folder)
        check_parameters(engine, reader, sources_of(targets))
        if targets is not None:
            out = targets.partition.master
            for f in targets.partition.fragments:
                place = out[f.offset : f.offset + f.numel]
                reader.read(f.parameter, MASTER, f.start, place)
        for index, partition in enumerate(list_partitions(engine)):
            if not partition.fragments:
                continue
            wanted = reader.states(partition.fragments[0].parameter)
            if averages is None:
                wanted = [name for name in wanted if name != EMA]
            elif EMA not in wanted:
                raise CheckpointError(
                    f"{folder} holds no moving average, since its run had no `ema`: start a new "
                    "run from its weights to begin one (python -m tools.convert export-weights "
                    "writes a file for initial_weights)"
                )
            for name in wanted:
                out = averages[index] if name == EMA else state_to_fill(engine, partition, name)
                out.zero_()  # the padding, too
                for f in partition.fragments:
                    reader.read(f.parameter, name, f.start, out[f.offset : f.offset + f.numel])
            # By parameter: another weight decay divides the same parameters into other groups.
            for name, value in reader.scalars(partition.fragments[0].parameter).items():
                set_scalar(engine, partition, name, value)
        return reader

    def go_back(self, step: int, records: Iterable[Path]) -> Aside:
        """Move the checkpoints after `step` aside; see `set_aside`. A collective."""

        def move() -> Aside:
            self._may_commit()
            return set_aside(self.root, step, records)

        return self._agree_on(move)

    def went_back_from(self, step: int) -> int | None:
        """See the function of this name. A collective."""
        return self._agree_on(lambda: went_back_from(self.root, step))

    # ---- agreement ---------------------------------------------------------------------------

    def _agree(self, action: Callable, temporary: Path | None = None) -> list:
        """Run `action` on every rank; every rank gets all results, or all raise together."""
        result, error = None, None
        try:
            result = action()
        except Exception as problem:
            if not isinstance(problem, OwnershipLost):
                log.exception("rank %d", self._rank)
            error = f"rank {self._rank}: {reason_of(problem)}"
        answers: list = [None] * self._world
        dist.all_gather_object(answers, (result, error))
        errors = [e for _, e in answers if e]
        if errors:
            if temporary is not None and self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError("; ".join(errors))
        return [result for result, _ in answers]

    def _agree_on(self, action: Callable, temporary: Path | None = None):
        """Run `action` on rank 0 alone; every rank gets its result, or all raise together."""
        return self._agree(action if self._rank == 0 else lambda: None, temporary)[0]
