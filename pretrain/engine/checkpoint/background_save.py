"""Checkpoints that are written while training goes on: copied between two steps, committed later.

Each rank has a process that writes its part (`checkpoint_writer`); when all have, rank 0 commits in
a thread, whose work is waiting for the disk.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from pretrain.engine.checkpoint.checkpoint import Checkpoints, Saving
from pretrain.engine.checkpoint.contents import Contents
from pretrain.engine.checkpoint.engine_state import module_tensors, sources_of
from pretrain.engine.checkpoint.files import CheckpointError
from pretrain.engine.checkpoint.snapshot import Snapshot
from pretrain.engine.launch.child_process import ChildProcess
from pretrain.engine.zero.momentum import TargetNetworks


class BackgroundCheckpoints(Checkpoints):
    """Checkpoints which also write in the background, one at a time.

    Args:
        device: on which the tensors lie.
        limit_s: a writer that takes longer is ended, and the save has failed.
        more: as of `Checkpoints`.
    """

    def __init__(self, *more, device: torch.device, limit_s: float = float("inf"), **named) -> None:
        super().__init__(*more, **named)
        self._part = BackgroundPart(device, limit_s)
        self._saving: Saving | None = None
        self._committer = ThreadPoolExecutor(1, "checkpoint")
        self._committed: Future | None = None

    def begin(
        self,
        engine,
        step: int,
        trainer: dict,
        averages: list[torch.Tensor] | None = None,
        targets: TargetNetworks | None = None,
    ) -> None:
        """Copy what `save` would write, and let it be written. A collective.

        The one before must be committed; until this one is, there is no checkpoint of it.

        Raises:
            CheckpointError: on every rank, if there is no memory for the copy on one of them.
        """
        saving = self._open(engine, step, trainer, targets)
        module = module_tensors(engine, sources_of(targets))  # a collective under ZeRO-3
        self._agree(
            lambda: self._part.start(
                self._contents(engine, module, averages, targets), saving.temporary
            ),
            saving.temporary,
        )
        self._saving = saving

    @property
    def unfinished(self) -> int | None:
        """The step whose checkpoint is not committed yet; the same on all ranks."""
        return self._saving.manifest["step"] if self._saving else None

    def busy(self) -> bool:
        """Whether this rank is writing or committing."""
        if self._committed is not None:
            return not self._committed.done()
        return self._part.busy()

    def advance(self) -> bool:
        """Go on with the unfinished one: from written to being committed, or to the end. A
        collective, which waits for ranks that are busy.

        Returns:
            Whether it is committed now.

        Raises:
            CheckpointError: as `save`.
        """
        saving, committed = self._saving, self._committed
        self._saving = self._committed = None  # of one that fails nothing is left
        if committed is None:
            entries = self._agree(self._part.result, saving.temporary)
            self._saving, self._committed = saving, Future()
            if self._rank == 0:
                self._committed = self._committer.submit(self._commit, saving, entries)
            else:
                self._committed.set_result(None)
            return False
        self._agree_on(committed.result, saving.temporary)
        return True

    def settle(self) -> None:
        """Commit the unfinished one, as soon as all ranks have written it. A collective.

        Raises:
            CheckpointError: as `save`.
        """
        while not self.advance():
            pass

    def close(self) -> None:
        """End what writes in the background, and give its memory back."""
        self._part.close()


class BackgroundPart:
    """This rank's part: one snapshot at a time, and its writer; both are made with the first.

    Args:
        device: on which the tensors lie.
        limit_s: a writer that takes longer is ended, and the save has failed.
    """

    def __init__(self, device: torch.device, limit_s: float = float("inf")) -> None:
        self._device, self._limit_s = device, limit_s
        self._snapshot: Snapshot | None = None
        self._writer: ChildProcess | None = None
        self._folder: Path | None = None
        self._since = 0.0

    def start(self, contents: Contents, folder: Path) -> None:
        """Copy the contents, and let them be written into `folder`.

        Raises:
            CheckpointError: there is no memory for it.
        """
        if self._snapshot is None:
            self._snapshot = Snapshot(self._device)
        pieces = self._snapshot.take(contents)
        if self._writer is None:
            descriptor = self._snapshot.descriptor
            self._writer = ChildProcess(
                "pretrain.engine.checkpoint.writer", [str(descriptor)], [descriptor]
            )
        self._writer.ask(
            {"folder": str(folder), "pieces": pieces, "size": max(stop for _, _, stop in pieces)}
        )
        self._folder, self._since = folder, time.monotonic()

    def busy(self) -> bool:
        """Whether the writer is at work, within its time."""
        if self._folder is None:
            return False
        return not self._writer.answered() and not self._is_late()

    def _is_late(self) -> bool:
        return time.monotonic() - self._since > self._limit_s

    def result(self) -> dict[str, dict[str, int | str]]:
        """Wait for the writer; name -> size and hash of each file.

        Raises:
            CheckpointError: it could not write, was ended, or took too long.
        """
        folder, self._folder = self._folder, None
        while not self._writer.answered(timeout_s=0.2):
            if self._is_late():
                self.close()
                raise CheckpointError(
                    f"the writer of {folder} took longer than failure.save_minutes "
                    f"({self._limit_s / 60:g}): look at the disk, or set it higher"
                )
        answer = self._writer.answer()
        if answer is None:
            ended, pid = self._writer.end_in_words(), self._writer.pid
            self.close()
            raise CheckpointError(f"the writer of {folder} (process {pid}) {ended}")
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return answer["files"]

    def close(self) -> None:
        """End the writer, and give the memory back."""
        if self._writer is not None:
            self._writer.close()
        if self._snapshot is not None:
            self._snapshot.close()
        self._writer = self._snapshot = self._folder = None
