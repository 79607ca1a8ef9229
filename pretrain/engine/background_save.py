"""This rank's part of a checkpoint, written by a process of its own while training goes on."""

import time
from pathlib import Path

import torch

from pretrain.engine.checkpoint_contents import Contents
from pretrain.engine.checkpoint_files import CheckpointError
from pretrain.engine.child_process import ChildProcess
from pretrain.engine.snapshot import Snapshot


class BackgroundSave:
    """One snapshot at a time, and its writer; both are made with the first.

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
                "pretrain.engine.checkpoint_writer", [str(descriptor)], [descriptor]
            )
        self._writer.ask({"folder": str(folder), "pieces": pieces,
                          "size": max(stop for _, _, stop in pieces)})
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
