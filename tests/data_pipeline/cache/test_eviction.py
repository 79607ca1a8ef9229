"""The known future, and eviction by it, against brute force."""

from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.cache.cache_plan import simulate
from data_pipeline.cache.eviction import CachePlan
from data_pipeline.cache.future import NEVER, BlockFuture


class Blocks:
    """Blocks of given sizes."""

    def __init__(self, sizes: list[float]) -> None:
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def sizes(self) -> np.ndarray:
        return np.array(self._sizes)


class Script:
    """Reads that are written down: the blocks of every step; `batch` steps are seen at a time."""

    def __init__(self, steps: list[list[int]], sizes: list[float], batch: int = 2) -> None:
        self.script, self.blocks, self.batch = steps, Blocks(sizes), batch

    def steps(self, start: int, stop: int):
        while start < stop:
            end = min(start + self.batch, stop)
            pairs = [(s, b) for s in range(start, end) for b in sorted(set(self.script[s]))]
            steps, blocks = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            yield end, steps, blocks
            start = end


COUNT = 7
scripts = st.lists(st.lists(st.integers(0, COUNT - 1), max_size=4), min_size=1, max_size=25)
batches = st.integers(1, 30)


@given(scripts, batches, st.data())
def test_next_use_is_that_of_the_script(script, batch, data):
    future = BlockFuture(Script(script, [1.0] * COUNT, batch), 0, len(script))
    everything = np.arange(COUNT)
    for now in range(len(script)):
        for _ in range(data.draw(st.integers(0, 2))):
            if future.known_until < len(script):
                future.look_ahead()
        found = future.next_use(everything)
        for block in range(COUNT):
            coming = [s for s in range(now, future.known_until) if block in script[s]]
            assert found[block] == (coming[0] if coming else NEVER)
        if future.known_until > now:
            assert future.uses(now).tolist() == sorted(set(script[now]))
        assert future.pending == sum(len(set(s)) for s in script[now : future.known_until])
        future.advance()
    assert future.next_use(everything).tolist() == [NEVER] * COUNT


def fewest_fetches(script: list[int], capacity: int) -> int:
    """Of all ways to serve one block after the other, by trying them all."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(script):
            return 0
        block = script[at]
        if block in held:
            return best(at + 1, held)
        if len(held) < capacity:
            return 1 + best(at + 1, held | {block})
        return 1 + min(best(at + 1, held - {victim} | {block}) for victim in held)

    return best(0, frozenset())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4), batches)
def test_no_policy_fetches_less(script, capacity, batch):
    reads = Script([[block] for block in script], [1.0] * 6, batch)
    outcome = simulate(reads, capacity, 0, len(script), read_ahead_steps=1)
    assert outcome.fetched == fewest_fetches(script, capacity)
    assert outcome.uses == len(script)
    assert outcome.most_held_bytes <= capacity


@given(scripts, st.integers(1, COUNT), batches, st.integers(1, 6))
def test_reading_ahead_keeps_the_cap_and_what_is_needed(script, capacity, batch, ahead):
    """At every moment: within the cap; nothing evicted before a block that is needed later."""
    sizes = [1.0, 1.0, 2.0, 1.0, 0.5, 1.0, 1.5]
    future = BlockFuture(Script(script, sizes, batch), 0, len(script))
    plan = CachePlan(future, COUNT, read_ahead_steps=ahead)
    held: set[int] = set()

    def next_use(block: int, now: int) -> int:
        return next((s for s in range(now, len(script)) if block in script[s]), NEVER)

    class Watched:
        def has_room(self, block):
            self.wanted = block
            return sum(sizes[b] for b in held) + sizes[block] <= capacity

        def fetch(self, block):
            held.add(block)
            assert sum(sizes[b] for b in held) <= capacity

        def evict(self, block):
            last = max(next_use(b, now) for b in held)
            assert next_use(block, now) == last > next_use(self.wanted, now)
            held.remove(block)

    store = Watched()
    for now in range(len(script)):
        plan.advance(now)
        while plan.look_ahead():
            pass
        plan.fill(store)
        assert held == set(np.flatnonzero(plan.held(np.arange(COUNT))).tolist())
        # Whatever is missing now had no room beside what is needed no later.
        for block in set(script[now]) - held:
            needed = [b for b in held if next_use(b, now) <= now]
            assert sum(sizes[b] for b in needed) + sizes[block] > capacity
            break


def test_little_is_remembered_of_what_has_passed():
    script = [[step % 5] for step in range(4000)]
    plan = CachePlan(
        BlockFuture(Script(script, [1.0] * 5, 50), 0, 4000), 5, read_ahead_steps=2, known_uses=100
    )
    plan.add(np.arange(3))
    for step in range(4000):
        plan.advance(step)
        while plan.look_ahead():
            assert plan.future.pending <= 150
    assert len(plan._by_step) + len(plan._steps) < 1500
    assert len(plan.future._blocks) < 250
