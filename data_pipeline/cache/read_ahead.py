"""What fills a node's cache: fetches blocks before they are read, evicts those needed last.

Only this decides what leaves the cache. It may be late, wrong, or dead: readers that miss a block
fetch it themselves.
"""

import concurrent.futures
import time
from collections.abc import Iterator, Mapping

import numpy as np

from data_pipeline.cache.blocks import Blocks, Extent
from data_pipeline.cache.cache import CacheSettings
from data_pipeline.cache.cache_folder import CacheError, CacheFolder, Reservation
from data_pipeline.cache.eviction import KNOWN_USES, CachePlan
from data_pipeline.cache.future import BlockFuture, NodeReads, RowsOf
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.reading.fetch_pool import FetchPool
from data_pipeline.reading.origin import Origin
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.remote import UrlStorage
from data_pipeline.storage.storage import TransientReadError

# Part of the cap that is left to readers who miss a block, and to evaluation.
SLACK_PART = 64

_FEW_USES = 1 << 16
_CLOSE_S = 3.0
_LOOK_S = 0.05
_LEAST_SCAN_INTERVAL_S = 60.0
_PAUSE_S = 60.0


class _Stopped(Exception):
    """Ends a download when the read-ahead ends."""


class ReadAhead:
    """Keeps the blocks in a cache folder that one node's ranks need next.

    Args:
        shards: task -> its shards.
        rows: task -> what turns positions into rows.
        sampler: steps, tasks and batch sizes; read from its `start_step` on.
        ranks: of this node.
        settings: folder, cap, blocks.
        downloads: at a time.
    """

    def __init__(
        self,
        shards: Mapping[str, ShardSet],
        rows: Mapping[str, RowsOf],
        sampler: StepSampler,
        ranks: range,
        settings: CacheSettings,
        downloads: int = 16,
    ) -> None:
        self.folder = CacheFolder(settings.folder, settings.max_bytes)
        self.fetched_blocks = 0
        self.fetched_bytes = dict.fromkeys(shards, 0)
        """By task; of tasks that share a shard, the first."""
        self.messages: list[str] = []
        """What the user should know; the caller empties it."""
        self._blocks = Blocks(shards, settings.block_bytes)
        self._origins = {name: Origin(shards[name]) for name in shards}
        self._storages: dict[int, tuple[str, UrlStorage, int]] = {}
        for name, each in shards.items():  # a storage that others share counts once
            known = name, each.storage, each.storage.retries
            self._storages.setdefault(id(each.storage), known)
        reads = NodeReads(sampler, rows, self._blocks, ranks)
        self._room = plannable_bytes(settings.max_bytes)
        fits = self._blocks.total_bytes <= self._room  # then nothing need ever be let go
        self.plan = CachePlan(
            BlockFuture(reads, sampler.start_step, sampler.stop_step),
            len(self._blocks),
            read_ahead_steps=settings.read_ahead_steps,
            known_uses=_FEW_USES if fits else KNOWN_USES,
        )
        self._share = self._room
        self._pool, self._most_coming = FetchPool(downloads), 2 * downloads
        self._coming: dict[int, tuple[str, Extent, concurrent.futures.Future[int]]] = {}
        self._held: dict[int, tuple[str, int]] = {}  # name and bytes; on its way or there
        self._held_bytes = 0
        self._strangers: list[str] = []  # blocks of other data sets or runs, the oldest last
        self._scan_at = self._resume_at = 0.0
        self._stopped = False

    def counters(self) -> dict[str, dict[str, int]]:
        """Task -> bytes_read and retries so far; of tasks that share a storage, the first has the
        retries."""
        counters = {task: {"bytes_read": count} for task, count in self.fetched_bytes.items()}
        for task, storage, before in self._storages.values():
            counters[task]["retries"] = storage.retries - before
        return counters

    def advance(self, step: int) -> None:
        """The run has come to `step`."""
        self.plan.advance(step)

    def work(self) -> bool:
        """Do what can be done without waiting; returns whether there is more to do soon.

        Faults of storage or folder are told in `messages`; reading goes on without this.
        """
        now = time.monotonic()
        more = True
        while more and time.monotonic() < now + _LOOK_S:
            more = self.plan.look_ahead()
        try:
            self._collect()
            if now < self._resume_at:
                return more
            if now >= self._scan_at:
                self._scan()
            places = self._most_coming - len(self._coming)
            if places:
                self.plan.fill(self, places)
        except CacheError as error:
            self._pause(str(error))
        return more or bool(self._coming)

    def close(self) -> None:
        """Break off downloads; nothing of them stays."""
        self._stopped = True
        self._pool.close()
        running = [future for *_, future in self._coming.values() if not future.done()]
        concurrent.futures.wait(running, timeout=_CLOSE_S)
        self.folder.discard_unfinished()

    # ---- Store: what the plan asks for -----------------------------------------------------------

    def has_room(self, block: int) -> bool:
        """Whether a block fits without letting go of one that this run needs."""
        extent = self._extent(block)
        if extent is None or self.folder.has(extent[1].name):
            return True
        size = extent[1].size
        if self._held_bytes + size > self._share:
            return False
        while self.folder.used() + size > self._room:
            if not self._strangers:
                return False
            self.folder.remove(self._strangers.pop())
        return True

    def fetch(self, block: int) -> None:
        """Have a block downloaded, unless it is there."""
        found = self._extent(block)
        if found is None:
            self.plan.drop(block)
            return
        task, extent = found
        self._hold(block, extent.name, extent.size)
        if block in self._coming or self.folder.has(extent.name):
            return
        reservation = self.folder.reserve(extent.name, extent.size)
        if reservation is None:
            self._lose(block)
            return
        origin = self._origins[task]
        future = self._pool.submit(lambda: self._download(origin, extent, reservation))
        self._coming[block] = task, extent, future

    def evict(self, block: int) -> None:
        """Let go of a block."""
        name, _ = self._held[block]
        self._forget(block)
        # One that comes so late that the run has overtaken it goes when it is whole.
        if block not in self._coming:
            self.folder.remove(name)

    # ---- inside ----------------------------------------------------------------------------------

    def _download(self, origin: Origin, extent: Extent, reservation: Reservation) -> int:
        """In a thread: fill a reservation, unless another process was faster."""
        try:
            with self.folder.fetching(extent.name):
                if self.folder.has(extent.name):
                    return 0
                self.folder.fill(reservation, self._chunks(origin, extent))
                return extent.size
        finally:
            self.folder.release(reservation)

    def _chunks(self, origin: Origin, extent: Extent) -> Iterator[bytes]:
        for chunk in origin.chunks(extent.number, extent.begin, extent.end):
            if self._stopped:
                raise _Stopped
            yield chunk

    def _collect(self) -> None:
        """Take in what has been downloaded."""
        done = [(b, *coming) for b, coming in self._coming.items() if coming[2].done()]
        for block, task, extent, future in done:
            del self._coming[block]
            error = future.exception()
            if error is None:
                self.fetched_bytes[task] += future.result()
                self.fetched_blocks += bool(future.result())
                if block not in self._held:
                    self.folder.remove(extent.name)
                continue
            self._lose(block)
            # If storage stays away, whoever needs the block will end the run.
            if isinstance(error, CacheError | TransientReadError | OSError):
                self._pause(str(error))
            elif not isinstance(error, ShardError):  # a damaged shard is its readers' business
                raise error

    def _scan(self) -> None:
        """See what is in the folder: from earlier runs, or fetched by readers themselves."""
        started = time.monotonic()
        found = self.folder.scan()
        mine = self._blocks.named(found)
        for name, block in mine.items():
            if block not in self._held:
                self._hold(block, name, found[name][0])
        new = np.array(list(mine.values()), dtype=np.int64)
        self.plan.add(new[~self.plan.held(new)])
        gone = set(self._held) - set(mine.values()) - set(self._coming)
        for block in gone:
            self._lose(block)
        others = [(written, name) for name, (_, written) in found.items() if name not in mine]
        self._strangers = [name for _, name in sorted(others, reverse=True)]
        self._share = self._room // max(self.folder.readers(), 1)
        took = time.monotonic() - started
        self._scan_at = time.monotonic() + max(_LEAST_SCAN_INTERVAL_S, 100 * took)

    def _extent(self, block: int) -> tuple[str, Extent] | None:
        """A task and where the block lies; None if the index of its shard cannot be read."""
        try:
            return self._blocks.extent(block)
        except (ShardError, OSError):
            return None

    def _hold(self, block: int, name: str, size: int) -> None:
        self._held[block] = name, size
        self._held_bytes += size

    def _forget(self, block: int) -> None:
        _, size = self._held.pop(block, ("", 0))
        self._held_bytes -= size

    def _lose(self, block: int) -> None:
        self._forget(block)
        self.plan.drop(block)

    def _pause(self, reason: str) -> None:
        now = time.monotonic()
        if now >= self._resume_at:  # what is under way fails for the same reason
            self.messages.append(f"{reason}; reading ahead pauses for {_PAUSE_S:.0f} s")
            self._resume_at = now + _PAUSE_S


def plannable_bytes(max_bytes: int) -> int:
    """The part of a cap that read-ahead fills."""
    return max_bytes - max_bytes // SLACK_PART
