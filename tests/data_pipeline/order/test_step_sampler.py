"""Which rank loads what: the global batches do not depend on ranks and workers."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order.order import Order
from data_pipeline.order.step_sampler import StepSampler, deal

WORLDS = [(1, 1), (2, 4), (6, 8), (8, 3), (64, 2)]


def schedule(step: int) -> tuple[str, int]:
    return ("a", step // 2) if step % 2 == 0 else ("b", step // 2)


def tasks(**sizes: tuple[int, int]) -> dict:
    return {
        name: SimpleNamespace(global_batch=size[0], micro_batch=size[1])
        for name, size in sizes.items()
    }


def requests_by_worker(sampler: StepSampler, workers: int) -> list[list]:
    """As DataLoader deals them: request i to worker i mod workers."""
    requests = list(sampler)
    return [requests[worker::workers] for worker in range(workers)]


@pytest.mark.parametrize(("world", "workers"), WORLDS)
def test_global_batches_are_those_of_one_process(world, workers):
    both = tasks(a=(48, 8), b=(130, 32))
    orders = {"a": Order.plan(5000, 1, 48), "b": Order.plan(777, 2, 130)}
    found: dict[tuple[int, str], list[int]] = {}
    for rank in range(world):
        sampler = StepSampler(schedule, both, rank, world, 10, 20)
        for requests in requests_by_worker(sampler, workers):
            for request in requests:
                real = np.array(request.positions)[np.array(request.valid)]
                rows = orders[request.task].rows(real)
                found.setdefault((request.step, request.task), []).extend(rows.tolist())
    for step in range(10, 20):
        task, visit = schedule(step)
        size = both[task].global_batch
        rows = orders[task].rows(np.arange(visit * size, (visit + 1) * size))
        assert sorted(found[step, task]) == sorted(rows.tolist())


@given(
    global_batch=st.integers(1, 300),
    micro_batch=st.sampled_from([1, 2, 4, 6, 32]),
    world=st.integers(1, 40),
)
def test_dealing(global_batch, micro_batch, world):
    hands = [deal(global_batch, micro_batch, rank, world) for rank in range(world)]
    shapes = [[len(part) for part in hand] for hand in hands]
    assert all(shape == shapes[0] for shape in shapes)
    assert max(shapes[0]) <= micro_batch
    dealt = np.concatenate([part for hand in hands for part in hand])
    assert np.array_equal(np.sort(dealt[dealt >= 0]), np.arange(global_batch))
    if micro_batch > 1:
        for hand in hands:
            for part in hand:
                present = set(part[part >= 0].tolist())
                assert all(p ^ 1 in present or (p ^ 1) >= global_batch for p in present)
    # No micro-step exists in which every rank only pads.
    for micro in range(len(shapes[0])):
        assert any((hand[micro] >= 0).any() for hand in hands)


@given(
    half=st.integers(1, 150), micro_batch=st.sampled_from([2, 4, 6, 32]), world=st.integers(1, 40)
)
def test_partners_are_rows_2i_and_2i_plus_1(half, micro_batch, world):
    """What mixes neighbours may rely on it: batches are even, and padding comes in pairs too."""
    for rank in range(world):
        for part in deal(2 * half, micro_batch, rank, world):
            assert len(part) % 2 == 0
            first, second = part[::2], part[1::2]
            assert np.array_equal(np.where(first < 0, -1, first ^ 1), second)


def test_a_lane_stays_with_one_rank():
    order = Order.plan(10**7, 0, 64)
    owner: dict[int, int] = {}
    for rank in range(4):
        for request in StepSampler(lambda s: ("a", s), tasks(a=(64, 16)), rank, 4, 0, 100):
            for position in request.positions:
                lane = position % order.row_lanes
                assert owner.setdefault(lane, rank) == rank


def test_requests_after_a_restart_continue():
    both = tasks(a=(12, 4), b=(6, 2))
    whole = list(StepSampler(schedule, both, 1, 2, 0, 30))
    for start in (0, 7, 29):
        later = list(StepSampler(schedule, both, 1, 2, start, 30))
        assert later == [request for request in whole if request.step >= start]


def test_cost_does_not_depend_on_the_step():
    far = StepSampler(lambda s: ("a", s), tasks(a=(12, 4)), 0, 1, 10**15, 10**15 + 1)
    assert next(iter(far)).positions[:2] == (12 * 10**15, 12 * 10**15 + 1)


def test_errors_name_the_task():
    with pytest.raises(ValueError, match="task a: micro_batch 3 would part neighbours"):
        StepSampler(schedule, tasks(a=(12, 3)), 0, 1, 0, 1)
    with pytest.raises(ValueError, match=r"task a: .*at least 1"):
        StepSampler(schedule, tasks(a=(0, 1)), 0, 1, 0, 1)
    with pytest.raises(ValueError, match="rank 2 does not exist"):
        StepSampler(schedule, tasks(a=(4, 2)), 2, 2, 0, 1)
