"""A look at some samples of a data set: do they hold the labels, texts and boxes that are wanted?

A name that is written wrong makes no fault where a target may be missing: the sample stays and
counts for nothing, and a whole run may learn nothing. So somebody has to look before it begins.
"""

import difflib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.loader.sequential_stream import SequentialStream
from data_pipeline.loader.stream import TaskStream
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.reading.webdataset_reader import ShardFault, streamed_samples
from data_pipeline.samples.members import AbsentValue, about_dots
from data_pipeline.samples.target import Target
from data_pipeline.storage.locations import is_url

SPREAD = 256
"""Samples of each data set that are looked at; all, if it has no more."""

_DESCRIBED = 4
_STREAMED_SHARDS = 4
_NAMED = 12


@dataclass
class Look:
    """What was found in some samples of one data set."""

    samples: int = 0
    """That could be read."""
    with_target: Counter[str] = field(default_factory=Counter)
    """`Target.name` -> samples that have it."""
    bad: int = 0
    """Samples that training will call bad for what they lack, or hold in its place."""
    with_kind: Counter[str] = field(default_factory=Counter)
    """`Target.kind` -> samples that have one of its targets."""
    reasons: dict[str, str] = field(default_factory=dict)
    """`Target.name` -> why the first sample that lacks it does."""
    members: Counter[str] = field(default_factory=Counter)
    """Extensions in samples that lack something."""
    keys: Counter[str] = field(default_factory=Counter)
    """json:KEY for what their JSON members hold."""

    def holds(self, source: str) -> str:
        """What samples hold that lack `source`, for people."""
        names = sorted(self.members)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        found = f"they hold members {', '.join(names[:_NAMED]) or 'of no name'}{more}"
        if hint := about_dots(names, [one.partition(":")[0] for one in source.split(" or ")]):
            return f"{found}, {hint}"
        if self.keys:
            shown = [name.removeprefix("json:") for name in sorted(self.keys)]
            more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
            found += f"; keys of the json: {', '.join(shown[:_NAMED])}{more}"
        near = difflib.get_close_matches(source, [*self.keys, *self.members], n=1, cutoff=0.7)
        return f"{found}; did you mean {near[0]}?" if near else found


def look(stream: TaskStream | SequentialStream, targets: Sequence[Target]) -> dict[str, Look]:
    """Look at a spread of samples of each data set of a stream; name of the data set -> found.

    Reads the members that hold targets, and of a few samples that lack some all the others. Without
    an order (evaluation) the samples are spread over the data set; else they are the same in every
    run of the recipe. Samples that cannot be read are passed over.

    Raises TransientReadError if storage fails.
    """
    if isinstance(stream, SequentialStream):
        return {"": _judged(_streamed(stream), targets)}
    # A reader of its own: a cache would fetch a block, or a whole shard, for each of these samples.
    limit = stream.reader.max_member_bytes
    with SampleReader(stream.reader.shards, max_member_bytes=limit) as reader:
        return {
            name: _judged(_read(reader, rows, targets), targets)
            for name, rows in _spread(stream).items()
        }


def _judged(samples: Iterable[tuple[Sample, Callable[[], Sample]]], targets: Sequence[Target]):
    """A Look at samples; each comes with what reads the whole of it."""
    seen = Look()
    described = 0
    for sample, whole in samples:
        seen.samples += 1
        kinds, lacking, damaged = set(), False, False
        for target in targets:
            try:
                target.read(sample)
            except BadSample as absent:
                seen.reasons.setdefault(target.name, absent.reason)
                lacking = True
                damaged |= not isinstance(absent, AbsentValue)
            else:
                seen.with_target[target.name] += 1
                kinds.add(target.kind)
        seen.with_kind.update(kinds)
        seen.bad += damaged or any(t.required and t.kind not in kinds for t in targets)
        if lacking and described < _DESCRIBED:
            described += 1
            _describe(whole(), seen)
    return seen


def _describe(sample: Sample, seen: Look) -> None:
    seen.members.update(sample.members.keys())
    try:
        record = json.loads(sample.members.get("json", b""))
    except (ValueError, RecursionError):
        return
    for key, value in record.items() if isinstance(record, dict) else ():
        seen.keys[f"json:{key}"] += 1
        if isinstance(value, dict):
            seen.keys.update(f"json:{key}.{inner}" for inner in value)


def _spread(stream: TaskStream) -> dict[str, list[int]]:
    """Rows to look at, of each data set of a stream."""
    if stream.order is None:
        places = _places(stream.n_rows)
        chosen = places if stream.selection is None else stream.selection.select(places)
        return {"": chosen.tolist()}
    remote = any(is_url(shard.path) for shard in stream.reader.shards.shards)
    order, found = stream.order, {}
    for name, own in order.by_source().items():
        # Of remote shards those that the run begins with, whose indices it needs anyway.
        count = min(own.n_rows, SPREAD)
        rows = own.rows(np.arange(count) if remote else _places(own.n_rows))
        first = order.first_row(name)
        found[name] = sorted({first + int(row) for row in rows})
    return found


def _places(count: int) -> np.ndarray:
    """At most SPREAD of `count` numbers, evenly."""
    looked = min(count, SPREAD)
    return np.arange(looked, dtype=np.int64) * count // max(looked, 1)


def _read(reader: SampleReader, rows: list[int], targets: Sequence[Target]):
    """Samples of these rows with the members of the targets."""
    wanted = {target.extension for target in targets}
    reader.expect(rows, wanted)
    for row in rows:
        try:
            sample = reader.read(row, wanted)
            yield sample, lambda row=row: reader.read(row)
        except BadSample:
            continue


def _streamed(stream: SequentialStream):
    """The first samples of some shards of a stream, which has no rows."""
    shards = _places(len(stream.urls))[:: max(1, len(stream.urls) // _STREAMED_SHARDS)]
    for shard in shards[:_STREAMED_SHARDS].tolist():
        samples = streamed_samples(stream.urls[shard], shard)
        try:
            for sample in itertools.islice(samples, SPREAD // _STREAMED_SHARDS):
                yield sample, lambda sample=sample: sample
        except ShardFault:
            continue
        finally:
            samples.close()
