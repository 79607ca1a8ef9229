"""The process that fills a node's cache: started by one rank of the node, ends with it.

    with Prefetcher(streams, sampler, ranks, settings, start_method) as prefetcher:
        prefetcher.advance(step)    # before each step

A process, and not a thread, so that downloads take no time from the thread that trains.
"""

import contextlib
import logging
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from data_pipeline.cache.cache import CacheSettings
from data_pipeline.cache.cache_folder import CacheError
from data_pipeline.cache.future import RowsOf
from data_pipeline.cache.read_ahead import ReadAhead
from data_pipeline.child_signals import held_back, ignore_signals
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.shards.shard_set import ShardSet

log = logging.getLogger("omnipretrain.data")

_BUSY_S, _IDLE_S = 0.02, 0.5
_END_S = 10.0


class Prefetcher:
    """Handle on the process, in the trainer. Whatever befalls the process, the run goes on."""

    def __init__(
        self,
        shards: Mapping[str, ShardSet],
        rows: Mapping[str, RowsOf],
        sampler: StepSampler,
        ranks: range,
        settings: CacheSettings,
        start_method: str,
    ) -> None:
        """Arguments as `ReadAhead`; `start_method` as `LoaderSettings`."""
        self._done = self._told = {task: Counter() for task in shards}
        self._arguments = (dict(shards), dict(rows), sampler, ranks, settings)
        self._context = multiprocessing.get_context(start_method)
        self._process: Any = None
        self._connection: Connection | None = None
        self._listens = True

    def __enter__(self) -> "Prefetcher":
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_run,
            args=(theirs, self._connection, *self._arguments),
            name="read-ahead",
            daemon=True,
        )
        with held_back():
            self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.send(None)
            self._process.join(_END_S)
            connection.close()
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def advance(self, step: int) -> dict[str, Counter[str]]:
        """Tell the process where the run is; never waits.

        Returns: task -> bytes_read and retries since the last call, as far as the process has told.
        """
        try:
            while self._connection is not None and self._connection.poll():
                self._take_in(*self._connection.recv())
            # One message at a time: a process that is busy, or stopped, must not fill the pipe.
            if self._connection is not None and self._listens:
                self._connection.send(step)
                self._listens = False
        except (EOFError, OSError):
            self._connection.close()
            self._connection = None
            self._process.join(1.0)
            log.warning(
                "the read-ahead of the cache has ended (exit code %s); batches are loaded without "
                "it, more slowly",
                self._process.exitcode,
            )
        told, self._told = self._told, self._done
        return {task: done - told[task] for task, done in self._told.items()}

    def _take_in(self, counters: dict[str, dict[str, int]], messages: list[str]) -> None:
        self._done = {task: Counter(counts) for task, counts in counters.items()}
        self._listens = True
        for message in messages:
            log.warning("%s", message)


def _run(
    connection: Connection,
    other_end: Connection,
    shards: Mapping[str, ShardSet],
    rows: Mapping[str, RowsOf],
    sampler: StepSampler,
    ranks: range,
    settings: CacheSettings,
) -> None:
    """The process: work until told to stop, or until the trainer is gone."""
    other_end.close()  # else this process would keep its own pipe alive
    ignore_signals()
    downloads = next(iter(shards.values())).storage.settings.requests_per_host
    ahead = ReadAhead(shards, rows, sampler, ranks, settings, downloads)
    code = 1
    try:
        _serve(connection, ahead)
        code = 0
    except CacheError as error:
        _report(connection, ahead, f"{error}; nothing is read ahead")
    except BaseException:
        _report(connection, ahead, f"a defect ends the read-ahead:\n{traceback.format_exc()}")
    finally:
        ahead.close()
        os._exit(code)  # now, whatever threads still wait for a dead server


def _serve(connection: Connection, ahead: ReadAhead) -> None:
    # The first notices at once that the trainer was killed, the second in every case.
    parent, trainer = os.getppid(), multiprocessing.parent_process()
    with ahead.folder.reading_ahead():
        while os.getppid() == parent and trainer.is_alive():
            busy = ahead.work()
            if not connection.poll(_BUSY_S if busy else _IDLE_S):
                continue
            try:
                step = connection.recv()
            except EOFError:
                return
            if step is None:
                return
            ahead.advance(step)
            connection.send((ahead.counters(), ahead.messages[:]))
            ahead.messages.clear()


def _report(connection: Connection, ahead: ReadAhead, last_words: str) -> None:
    with contextlib.suppress(OSError):
        connection.send((ahead.counters(), [*ahead.messages, last_words]))
