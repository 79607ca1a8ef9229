"""Repeated augmentation: which image stands where, with which draws, and what an epoch is."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.cache.blocks import Blocks
from data_pipeline.cache.future import NodeReads
from data_pipeline.filters.selection import Selection
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.order.plan import plan_order
from data_pipeline.order.repeats import RepeatedOrder, repeats_problem
from data_pipeline.order.revisions import RevisedOrder, Revision, revise
from data_pipeline.order.sources import Source
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import damage, pack, stream

N, BATCH, REPEATS = 103, 24, 3
BAD = [5, 31, 32, 70]
STEPS = 16


def mixed() -> MixedOrder:
    return MixedOrder({"a": Order(40, seed=1), "b": Order(63, seed=2)}, [1, 2], seed=3)


IMAGES = {
    "plain": Order(N, seed=4),
    "kept": KeptOrder(Order(52, seed=5), Selection.gather(N, [np.arange(N) % 2 == 0])),
    "revised": RevisedOrder(Order(N, seed=6), [Revision(N, [[3, 9]], [])]),
    "mixed": mixed(),
}


# ---- positions ---------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(IMAGES)),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([2, 4, 10]),
    st.integers(0, 10**9),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_shows_its_images_once_in_each_part(kind, repeats, own, step):
    images, batch = IMAGES[kind], own * repeats
    order = RepeatedOrder(images, batch, repeats)
    rows = order.rows(np.arange(step * batch, (step + 1) * batch))
    wanted = images.rows(np.arange(step * own, (step + 1) * own))
    assert np.array_equal(rows.reshape(repeats, own), np.tile(wanted, (repeats, 1)))
    shuffled = np.random.default_rng(0).permutation(batch)
    assert np.array_equal(order.rows(step * batch + shuffled), rows[shuffled])


def test_partners_are_different_images_of_one_source():
    order = RepeatedOrder(mixed(), BATCH, REPEATS)
    positions = np.arange(40 * BATCH)
    places = order.places(positions)
    assert np.array_equal(places ^ 1, order.places(positions ^ 1))
    choices, _ = order.images.locate(places)
    assert np.array_equal(choices[::2], choices[1::2])


def test_epochs_count_images():
    order = RepeatedOrder(IMAGES["plain"], BATCH, REPEATS)
    steps = 9 * N  # exactly 72 passes of 8 images a step
    rows = order.rows(np.arange(steps * BATCH)).reshape(steps, REPEATS, -1)[:, 0].ravel()
    assert np.bincount(rows, minlength=N).tolist() == [72] * N
    for epoch in range(72):
        assert len(set(rows[epoch * N : (epoch + 1) * N].tolist())) == N
    assert order.passes(steps * BATCH) == 72.0
    # Of a batch that has begun its first part is new, its others are not.
    assert [order.images_of(n) for n in (0, 5, 8, 9, 24, 25, 48)] == [0, 5, 8, 8, 8, 9, 16]
    both = RepeatedOrder(mixed(), BATCH, REPEATS)
    assert both.epochs(9 * BATCH) == mixed().epochs(72) and both.passes(BATCH) == 8 / N


def test_copies_share_their_substitutes_which_are_not_in_the_batch():
    order = RepeatedOrder(Order(2000, seed=7), BATCH, REPEATS)
    batch = np.arange(7 * BATCH, 8 * BATCH)
    every = [order.rows(batch, attempt).reshape(REPEATS, -1) for attempt in range(16)]
    for rows in every:
        assert (rows == rows[0]).all()
    assert len(set(np.stack(every[1:])[:, 0].ravel().tolist())) == 15 * 8
    # 8 images leave room in a data set of 16, in which a batch of 24 images would leave none.
    assert RepeatedOrder(Order(16, seed=0), BATCH, REPEATS).can_avoid(np.arange(BATCH), 3)
    assert not RepeatedOrder(Order(15, seed=0), BATCH, REPEATS).can_avoid(np.arange(BATCH), 3)


def test_is_the_same_forever():
    order = RepeatedOrder(Order(1000, seed=3), 12, 3)
    assert order.places(np.arange(12, 24)).tolist() == [4, 5, 6, 7] * 3
    assert order.places(np.array([10**9])).tolist() == [10**9 // 12 * 4 + 10**9 % 12 % 4]


@pytest.mark.parametrize(
    ("batch", "repeats", "way_out"),
    [
        (256, 3, "use 252 or 258"),
        (9, 3, "use 6 or 12"),
        (4, 4, "use 8"),
    ],
)
def test_batches_that_do_not_divide_into_whole_pairs(batch, repeats, way_out):
    with pytest.raises(ValueError, match=rf"global_batch={batch} is not a multiple .*{way_out}"):
        RepeatedOrder(Order(N, seed=0), batch, repeats)
    assert repeats_problem(batch, 1) is None


def test_a_stream_cannot_repeat():
    with pytest.raises(ValidationError, match="repeats=2: a stream has no order"):
        CaptionDataSettings(stream={"shards": ["pipe:cat x.tar"]}, repeats=2)


# ---- revisions ---------------------------------------------------------------------------------


def test_revisions_are_of_images():
    order = RepeatedOrder(Order(N, seed=8), BATCH, REPEATS)
    changed = revise(order, {"": [Revision(2 * N, [[5, 8]], [])]})
    assert isinstance(changed, RepeatedOrder) and isinstance(changed.images, RevisedOrder)
    positions = np.arange(100 * BATCH)
    before = changed.places(positions) < 2 * N
    assert np.array_equal(changed.rows(positions)[before], order.rows(positions)[before])
    later = changed.rows(positions)[~before]
    assert {5, 6, 7}.isdisjoint(later.tolist()) and len(set(later.tolist())) == N - 3
    # The border lies inside a batch, whose parts nevertheless show the same images.
    crossing = 2 * N // 8
    rows = changed.rows(np.arange(crossing * BATCH, (crossing + 1) * BATCH)).reshape(REPEATS, -1)
    assert 2 * N % 8 > 0 and (rows == rows[0]).all()
    assert pickle.loads(pickle.dumps(changed)).rows(positions).tolist() == (
        changed.rows(positions).tolist()
    )
    assert RepeatedOrder(mixed(), BATCH, REPEATS).by_source().keys() == {"a", "b"}


# ---- batches -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("repeats")
    pack(folder, N)
    damage(folder, BAD)
    return ShardSet.open(str(folder))


def repeated(shards: ShardSet, micro_batch: int = 4, repeats: int = REPEATS) -> TaskStream:
    task = stream(shards, BATCH, micro_batch)
    order = plan_order([Source("", shards, 1.0)], BATCH, 7, task.name, repeats)
    return TaskStream(task.name, task.reader, order, task.fields, task.seed, BATCH, micro_batch)


def load(shards: ShardSet, world: int, workers: int, start: int = 0) -> dict[int, tuple]:
    """Position -> row, pixels, tokens and faults, over all ranks."""
    found = {}
    for rank in range(world):
        sampler = StepSampler(
            lambda step: ("caption", step), {"caption": repeated(shards)}, rank, world, start, STEPS
        )
        requests = list(sampler)
        for worker in range(workers):
            own = repeated(shards)
            for batch in map(own.load, requests[worker::workers]):
                for place, position in enumerate(batch["position"].tolist()):
                    if position < 0:
                        continue
                    assert position not in found
                    found[position] = (
                        int(batch["row"][place]),
                        batch["images"][place].numpy().tobytes(),
                        batch["tokens"][place][batch["loss_mask"][place]].tolist(),
                        [f[2:] for f in batch["faults"] if f.position == position],
                    )
    return found


@pytest.fixture(scope="module")
def alone(shards) -> dict[int, tuple]:
    return load(shards, 1, 1)


def test_copies_have_the_row_and_draws_of_their_own(alone):
    assert sorted(alone) == list(range(STEPS * BATCH))
    substituted = 0
    for step in range(STEPS):
        for image in range(8):
            copies = [alone[step * BATCH + part * 8 + image] for part in range(REPEATS)]
            rows, pixels, _, faults = zip(*copies, strict=True)
            assert len(set(rows)) == 1 and rows[0] not in BAD
            assert len(set(pixels)) == REPEATS
            assert faults[0] == faults[1] == faults[2]
            substituted += bool(faults[0])
        assert len({alone[step * BATCH + place][0] for place in range(BATCH)}) == 8
    assert substituted >= len(BAD)  # more than one epoch: 128 images of 103


@pytest.mark.parametrize(
    ("world", "workers", "start"), [(2, 2, 0), (3, 1, 0), (3, 2, 5), (1, 3, 9)]
)
def test_any_world_and_any_resume_load_the_same(shards, alone, world, workers, start):
    later = {position: v for position, v in alone.items() if position >= start * BATCH}
    assert load(shards, world, workers, start) == later


def test_worker_processes_and_epoch(shards, alone):
    task = repeated(shards)
    options = LoaderSettings(workers=2, max_bad_fraction=1.0)
    loader = StepLoader({"caption": task}, lambda s: ("caption", s), options, 1, 2, 3, 6)
    rows = {}
    for window in loader:
        for batch in window.micro_batches:
            rows |= dict(zip(batch["position"].tolist(), batch["row"].tolist(), strict=True))
    rows.pop(-1, None)
    assert len(rows) == 3 * BATCH // 2
    assert all(alone[position][0] == row for position, row in rows.items())
    assert task.epochs(3 * BATCH) == {"epoch": 24 / N} and task.n_rows == N


def test_the_cache_reads_ahead_what_batches_read(shards, alone):
    """The blocks of one node of two, step by step, those of substitutes left out."""
    task, blocks = repeated(shards), Blocks({"caption": shards}, 8192)
    sampler = StepSampler(lambda s: ("caption", s), {"caption": task}, 0, 4, 0, STEPS)
    reads = NodeReads(sampler, {"caption": task.order.rows}, blocks, range(2))
    parts = list(zip(*reads.steps(0, STEPS), strict=True))
    steps, found = (np.concatenate(part) for part in parts[1:])
    wanted = set()
    for rank in range(2):
        for request in StepSampler(sampler.schedule, sampler.tasks, rank, 4, 0, STEPS):
            positions = np.array([p for p in request.positions if p >= 0 and not alone[p][3]])
            rows = np.array([alone[position][0] for position in positions.tolist()])
            own = blocks.of_rows("caption", rows).tolist() if rows.size else []
            wanted |= {(request.step, block) for block in own}
    pairs = set(zip(steps.tolist(), found.tolist(), strict=True))
    assert len(blocks) > 8 and wanted <= pairs
    assert len(pairs - wanted) <= 16  # of 12 bad visits


def test_another_number_is_other_data(shards):
    prints = {repeated(shards, repeats=n).fingerprint for n in (1, 2, 3)}
    assert len(prints) == 3
    assert repeated(shards, repeats=1).fingerprint == stream(shards, BATCH).fingerprint
