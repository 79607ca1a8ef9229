"""What each loader process is doing at this moment, for whoever wonders why no batch comes.

A process that hangs in a read cannot be asked any more, so it notes beforehand what it is about to
do, in memory that it shares with the trainer: half a microsecond a note. Code far from the loader
(storage that retries) calls the functions of this module; outside of a loader they do nothing.

A note may be read while it is written. It then tells of two moments at once, which a person who
looks for a stall can live with.

The last spans of time that have ended stand in a ring behind the note, for who draws a trace.
"""

import multiprocessing
import os
import struct
import time
from typing import NamedTuple

STAGES = ("idle", "order", "read", "decode", "collate")
_NUMBERS = {stage: number for number, stage in enumerate(STAGES)}

_REQUEST = struct.Struct("<qqq")  # process, step, micro-step
_SAMPLE = struct.Struct("<dqqqq")  # since, stage, position, row, substitute
_RANGE = struct.Struct("<qqq")  # shard, begin, end
_RETRY = struct.Struct("<qH")  # attempts that failed, length of the reason
_REASON_BYTES = 160
_SAMPLE_AT = _REQUEST.size
_RANGE_AT = _SAMPLE_AT + _SAMPLE.size
_RETRY_AT = _RANGE_AT + _RANGE.size
# The three together: one call writes a sample and clears what belonged to the one before.
_SAMPLE_ALONE = struct.Struct("<dqqqqqqqqH")
_RING_AT = -(-(_RETRY_AT + _RETRY.size + _REASON_BYTES) // 8) * 8
_ENDED = struct.Struct("<q")  # spans that have ended so far
_SPAN = struct.Struct("<ddqqq")  # begin, end, stage, step, position
_SPANS = 4096
_SLOT_BYTES = _RING_AT + _ENDED.size + _SPANS * _SPAN.size


class Activity(NamedTuple):
    """What a process does, as it noted it."""

    process: int
    """Its number in the system; 0 before its first request."""
    step: int
    micro: int
    """Of the request that it works on."""
    since: float
    """`time.monotonic()` of the last change of stage or sample."""
    stage: str
    """One of STAGES."""
    position: int
    row: int
    substitute: int
    """0 for the sample that stands at the position, a for its a-th substitute."""
    shard: int
    """Number of the shard that is read; -1 for none."""
    begin: int
    end: int
    """Bytes of it that are read."""
    failures: int
    """Attempts of this read that failed."""
    reason: str
    """Why the last of them failed."""


class Span(NamedTuple):
    """What a process has done."""

    process: int
    begin: float
    end: float
    """`time.monotonic()`."""
    stage: str
    """One of STAGES, but idle."""
    step: int
    position: int
    """-1 where it was no single sample's."""


class ActivityBoard:
    """One slot for each loader process, shared with the trainer."""

    def __init__(self, workers: int, start_method: str) -> None:
        """`workers` 0: one slot, for the trainer's own process."""
        self._slots = max(workers, 1)
        context = multiprocessing.get_context(start_method)
        # Anonymous memory: it is gone with its last process, however that ends.
        self._memory = context.RawArray("B", self._slots * _SLOT_BYTES)

    def use(self, worker: int) -> None:
        """From now on this process notes what it does in the slot of `worker`."""
        global _slot, _ended, _open
        begin = worker * _SLOT_BYTES
        _slot = memoryview(self._memory).cast("B")[begin : begin + _SLOT_BYTES]
        _open, (_ended,) = None, _ENDED.unpack_from(_slot, _RING_AT)

    def read(self) -> list[Activity]:
        """What the processes do, by worker."""
        found = []
        for worker in range(self._slots):
            slot = bytes(memoryview(self._memory).cast("B")[worker * _SLOT_BYTES :][:_SLOT_BYTES])
            since, stage, *sample = _SAMPLE.unpack_from(slot, _SAMPLE_AT)
            failures, length = _RETRY.unpack_from(slot, _RETRY_AT)
            reason = slot[_RETRY_AT + _RETRY.size :][:length].decode("utf-8", "replace")
            request, span = _REQUEST.unpack_from(slot, 0), _RANGE.unpack_from(slot, _RANGE_AT)
            found.append(Activity(*request, since, STAGES[stage], *sample, *span, failures, reason))
        return found

    def spans(self) -> list[Span]:
        """The last stages that have ended, of all processes; at most 4,096 of each."""
        found = []
        for worker in range(self._slots):
            slot = bytes(memoryview(self._memory).cast("B")[worker * _SLOT_BYTES :][:_SLOT_BYTES])
            process, *_ = _REQUEST.unpack_from(slot, 0)
            (ended,) = _ENDED.unpack_from(slot, _RING_AT)
            for number in range(max(ended - _SPANS, 0), ended):
                begin, end, stage, step, position = _SPAN.unpack_from(slot, _span_at(number))
                found.append(Span(process, begin, end, STAGES[stage], step, position))
        return found


_slot: memoryview | None = None
_ended = _step = 0
_open: tuple[float, int, int] | None = None
"""Since when, stage and position of what this process does; None = idle."""


def working_on(step: int, micro: int) -> None:
    """A request has arrived; its order is being computed."""
    global _step
    if _slot is not None:
        _step = step
        _REQUEST.pack_into(_slot, 0, os.getpid(), step, micro)
        _note("order", -1, -1, 0)


def idle() -> None:
    """The batch is done."""
    if _slot is not None:
        _note("idle", -1, -1, 0)


def reading(position: int, row: int, substitute: int) -> None:
    """A sample is to be read."""
    if _slot is not None:
        _note("read", position, row, substitute)


def decoding(position: int, row: int, substitute: int) -> None:
    """Its bytes are here."""
    if _slot is not None:
        _note("decode", position, row, substitute)


def collating() -> None:
    """All samples of the batch are here."""
    if _slot is not None:
        _note("collate", -1, -1, 0)


def reading_bytes(shard: int, begin: int, end: int) -> None:
    """The bytes [begin, end) of a shard are being asked for."""
    if _slot is not None:
        _RANGE.pack_into(_slot, _RANGE_AT, shard, begin, end)


def retrying(failures: int, reason: str) -> None:
    """So many attempts of a read have failed; `reason` tells of the last one."""
    if _slot is not None:
        text = reason.encode("utf-8", "replace")[:_REASON_BYTES]
        _RETRY.pack_into(_slot, _RETRY_AT, failures, len(text))
        begin = _RETRY_AT + _RETRY.size
        _slot[begin : begin + len(text)] = text


def _note(stage: str, position: int, row: int, substitute: int) -> None:
    global _ended, _open
    now, number = time.monotonic(), _NUMBERS[stage]
    if _open is not None:
        begin, ended_stage, of = _open
        _SPAN.pack_into(_slot, _span_at(_ended), begin, now, ended_stage, _step, of)
        _ended += 1
        _ENDED.pack_into(_slot, _RING_AT, _ended)
    _open = (now, number, position) if number else None
    _SAMPLE_ALONE.pack_into(
        _slot, _SAMPLE_AT, now, number, position, row, substitute, -1, 0, 0, 0, 0
    )


def _span_at(number: int) -> int:
    return _RING_AT + _ENDED.size + number % _SPANS * _SPAN.size
