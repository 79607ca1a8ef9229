"""Where a GPU's memory is: pages for a browser, drawn by torch, of a while or of an out-of-memory
error."""

import logging
from pathlib import Path

import torch

log = logging.getLogger("omnipretrain.memory")

_MOST_EVENTS = 100_000


class MemoryHistory:
    """Records what is allocated and freed, with its stacks, between `start` and `stop`; nothing
    where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def start(self) -> None:
        """From now on."""
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)

    def stop(self) -> str | None:
        """The timeline as a page of HTML."""
        if not self._on_gpu:
            return None
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        return page(snapshot, timeline=True)


def page(snapshot: dict, timeline: bool) -> str:
    """A snapshot of torch's allocator as a page of HTML: what happened, or what there is."""
    from torch.cuda import _memory_viz

    return _memory_viz.trace_plot(snapshot) if timeline else _memory_viz.segment_plot(snapshot)


def watch_for_out_of_memory(folder: Path, rank: int, device: torch.device) -> None:
    """Leave a picture of the memory, and a table, when an allocation fails: at that moment, since
    much is freed before anybody can handle the error."""
    if device.type != "cuda":
        return

    def note(_device: int, asked: int, total: int, free: int) -> None:
        leave_picture(
            folder, rank, torch.cuda.memory._snapshot(), torch.cuda.memory_summary(), asked, free
        )

    torch._C._cuda_attach_out_of_memory_observer(note)


def leave_picture(
    folder: Path, rank: int, snapshot: dict, table: str, asked: int, free: int
) -> None:
    """Write `out_of_memory_rank_N.html` and `.txt`; says where, and never fails.

    Args:
        snapshot: of the allocator.
        table: its summary.
        asked, free: bytes that were asked for, and that the device had left.
    """
    path = folder / f"out_of_memory_rank_{rank:05d}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = f"{asked:,} bytes were asked for, {free:,} were free\n{table}\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        path.write_text(page(snapshot, timeline=False), encoding="utf-8")
    except Exception as error:
        log.warning("rank %d is out of GPU memory; no picture of it: %s", rank, error)
        return
    log.error("rank %d is out of GPU memory: what it held is in %s, for a browser", rank, path)
