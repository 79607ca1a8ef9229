"""What a step reads, for worlds, batches, conditions, mixtures and starts that hypothesis draws.

One uninterrupted stream, position by position, is the yardstick: rows, keys, pixels, tokens and
substitutes of any other run must be equal to it, byte for byte. test_worlds.py holds the cases that
must never be left out; here are those that nobody thought of.
"""

import functools
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from data_pipeline.filters.expressions import Expression
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.plan import plan_order
from data_pipeline.order.sources import concatenated, open_sources
from data_pipeline.order.step_sampler import MicroBatch, StepSampler
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.shards.shard_set import CACHE_VARIABLE, ShardSet
from tests.data_pipeline.photos import damage, pack, tokenizer

SIZES = {"x": 60, "y": 17}
BAD = {"x": [5, 31, 32], "y": [4]}
CAPTIONS = [
    {"source": "json:captions", "weight": 2, "templates": ["a {}", "{} here"]},
    {"source": "txt"},
]
STEPS = 5


def schedule(step: int) -> tuple[str, int]:
    """A single task."""
    return "task", step


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for name, samples in SIZES.items():
        folder = tmp_path_factory.mktemp(name)
        pack(folder, samples, per_shard=11)
        damage(folder, BAD[name])
        folders[name] = str(folder)
    return folders


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


conditions = st.sampled_from(
    [
        None,
        "captions.count > 0",
        "key >= '00008'",
        "captions.count != 1 and bytes:jpg > 1500",
        "not missing(captions.words.max) or key < '00010'",
        "shard != 'test-000001.tar'",
    ]
)


@st.composite
def plans(draw) -> dict:
    """What belongs to a run: data, conditions and batches, but no world."""
    batch = draw(st.sampled_from([2, 6, 10, 24]))
    plan = {
        "where": {name: draw(conditions) for name in ("x", "y")},
        "weights": draw(st.sampled_from([None, (1.0, 1.0), (3.0, 1.0), (1.0, 2.5)])),
        "global_batch": batch,
        "captions_per_image": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 3)),
        # Steps before the first one that is looked at: 0, inside an epoch, or very far away.
        "first": draw(st.sampled_from([0, 3, 10**6, 10**9])),
    }
    return plan


worlds = st.tuples(
    st.integers(1, 7),  # ranks
    st.integers(1, 3),  # workers
    st.sampled_from([1, 2, 4, 8]),  # micro-batch
    st.integers(0, STEPS - 1),  # steps after which the run was interrupted
)


def stream(folders, plan, micro_batch: int) -> TaskStream:
    image = ImageSettings(size=16, flip_probability=0.5, brightness=0.3)
    parts = {name: {"shards": [folders[name]], "where": plan["where"][name]} for name in ("x", "y")}
    if plan["weights"] is None:
        data = parts["x"]
    else:
        for part, weight in zip(parts.values(), plan["weights"], strict=True):
            part["weight"] = weight
        data = {"sources": parts}
    data = CaptionDataSettings(
        **data, image=image, caption_source=CAPTIONS, captions_per_image=plan["captions_per_image"]
    )
    sources = open_sources(data)
    order = plan_order(sources, plan["global_batch"], plan["seed"], "task")
    fields = CaptionProcessor(data, tokenizer(), train=True)
    return TaskStream(
        "task",
        SampleReader(concatenated(sources)),
        order,
        fields,
        plan["seed"],
        plan["global_batch"],
        min(micro_batch, plan["global_batch"]),
    )


def contents(task: TaskStream, request: MicroBatch) -> dict[int, tuple]:
    """position -> all that is loaded for it."""
    batch = task.load(request)
    return {
        position: (
            int(batch["row"][place]),
            batch["key"][place],
            batch["images"][place].numpy().tobytes(),
            batch["tokens"][place][batch["loss_mask"][place]].tolist(),
            [tuple(fault) for fault in batch["faults"] if fault.position == position],
        )
        for place, position in enumerate(batch["position"].tolist())
        if position >= 0
    }


@given(plans(), worlds)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_run_continues_the_uninterrupted_stream(folders, plan, shape):
    ranks, workers, micro_batch, interrupted = shape
    alone = stream(folders, plan, plan["global_batch"])
    start = plan["first"] + interrupted
    stop = min(start + 2, plan["first"] + STEPS)
    first, last = (step * plan["global_batch"] for step in (start, stop))
    straight = {}
    for position in range(first, last):  # one by one: nothing depends on neighbours in a batch
        straight |= contents(alone, MicroBatch(0, 0, "task", (position,), (True,)))
    found = {}
    for rank in range(ranks):
        task = stream(folders, plan, micro_batch)
        requests = list(StepSampler(schedule, {"task": task}, rank, ranks, start, stop))
        for worker in range(workers):
            own = stream(folders, plan, micro_batch)
            for request in requests[worker::workers]:
                part = contents(own, request)
                assert not found.keys() & part.keys()
                found |= part
    event("with substitutes" if any(faults for *_, faults in found.values()) else "all whole")
    assert found == straight
    _check_conditions(alone, plan, found)


def _check_conditions(task: TaskStream, plan: dict, found: dict[int, tuple]) -> None:
    """Rows that were read, substitutes among them, meet the condition of their source."""
    shards = task.reader.shards
    rows = np.array([row for row, *_ in found.values()])
    for name, first in (("x", 0), ("y", SIZES["x"])):
        mine = rows[(rows >= first) & (rows < first + SIZES[name])]
        if plan["where"][name] is not None:
            kept = _kept(tuple(shards.shards), plan["where"][name])
            assert kept[mine].all()


@functools.cache
def _kept(shards: tuple, where: str) -> np.ndarray:
    """Evaluated by hand on whole columns, without `filters`."""
    data = ShardSet(shards)
    columns = {
        "key": np.concatenate([data.index(number).keys() for number in range(len(shards))]),
        "shard": np.repeat([s.name for s in shards], [s.samples for s in shards]),
    }
    expression = Expression(where)
    for name in expression.columns.keys() - columns.keys():
        columns[name] = data.column(name)
    return expression(columns.__getitem__, len(data))


def test_epochs_of_sources_are_exact_with_conditions(folders):
    plan = {
        "where": {"x": "captions.count > 0", "y": "key < '00010'"},
        "weights": (3.0, 1.0),
        "global_batch": 8,
        "captions_per_image": 1,
        "seed": 0,
    }
    task = stream(folders, plan, 8)
    assert task.n_rows == 45 + 10
    samples = 8 * 40
    rows = task.order.rows(np.arange(samples))
    of_x, of_y = rows[rows < SIZES["x"]], rows[rows >= SIZES["x"]]
    assert (len(of_x), len(of_y)) == (240, 80)
    assert task.epochs(samples) == {"epoch": samples / 55, "epoch_x": 240 / 45, "epoch_y": 8.0}
    assert set(np.bincount(of_x)[[n for n in range(60) if n % 4]].tolist()) == {5, 6}
    assert np.bincount(of_y - SIZES["x"]).tolist() == [8] * 10


def test_the_first_batch_costs_the_same_anywhere(folders):
    """Position 10 or 10**9: CPU time of a stream that starts there, in turns, best of each."""
    plan = {
        "where": {"x": "captions.count > 0", "y": None},
        "weights": (3.0, 1.0),
        "global_batch": 24,
        "captions_per_image": 1,
        "seed": 1,
    }
    spent = {10: [], 10**9: []}
    for _ in range(7):
        for start, seconds in spent.items():
            begin = time.process_time()
            task = stream(folders, plan, 24)
            steps = range(start // 24, start // 24 + 1)
            for request in StepSampler(schedule, {"task": task}, 0, 1, steps.start, steps.stop):
                task.load(request)
            seconds.append(time.process_time() - begin)
    near, far = (min(seconds) for seconds in spent.values())
    assert far < 1.5 * near
