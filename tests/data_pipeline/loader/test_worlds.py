"""What is loaded for a position is a function of the position alone.

No DataLoader here: each (rank, worker) gets streams of its own and the requests that a DataLoader
would deal to it, so that worlds of any size can be tried in one process. test_loader.py does the
same with real worker processes, for smaller worlds.
"""

import numpy as np
import pytest

from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.step_sampler import StepSampler
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import damage, pack, stream

WORLDS = [(2, 4), (6, 8), (8, 3), (64, 2)]
SAMPLES, BAD, STEPS = 103, [5, 31, 32, 70], 9
BATCHES = {"a": (24, 4), "b": (10, 6)}
"""Task -> global and micro-batch; 9 steps are 1.4 epochs of task a."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("worlds")
    pack(folder, SAMPLES)
    damage(folder, BAD)
    return ShardSet.open(str(folder))


def schedule(step: int) -> tuple[str, int]:
    """Task b every third step."""
    return ("b", step // 3) if step % 3 == 2 else ("a", step - (step + 1) // 3)


def streams(shards: ShardSet, seed: int = 7) -> dict[str, TaskStream]:
    more = {"captions_per_image": 2, "caption_source": "json:captions"}
    return {
        name: stream(shards, *sizes, name=name, seed=seed, **(more if name == "b" else {}))
        for name, sizes in BATCHES.items()
    }


def load(shards: ShardSet, world: int, workers: int, start: int = 0, seed: int = 7) -> dict:
    """(step, position) -> row, key, pixels, supervised tokens and faults, over all ranks."""
    found = {}
    for rank in range(world):
        requests = list(StepSampler(schedule, streams(shards), rank, world, start, STEPS))
        for worker in range(workers):
            own = streams(shards, seed)
            for request in requests[worker::workers]:
                batch = own[request.task].load(request)
                for place, position in enumerate(batch["position"].tolist()):
                    if position < 0:
                        continue
                    mask = batch["loss_mask"][place]
                    assert (request.step, position) not in found
                    found[request.step, position] = (
                        int(batch["row"][place]),
                        batch["key"][place],
                        batch["images"][place].numpy().tobytes(),
                        batch["tokens"][place][mask].tolist(),
                        [tuple(f) for f in batch["faults"] if f.position == position],
                    )
    return found


@pytest.fixture(scope="module")
def alone(shards) -> dict:
    return load(shards, 1, 1)


@pytest.mark.parametrize(("world", "workers"), WORLDS)
def test_bytes_pixels_tokens_and_substitutes_are_those_of_one_process(
    shards, alone, world, workers
):
    assert load(shards, world, workers) == alone


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_stream_resumed_anywhere_goes_on_as_if_uninterrupted(shards, alone, start):
    world, workers = WORLDS[start % 3]
    later = {key: value for key, value in alone.items() if key[0] >= start}
    assert load(shards, world, workers, start) == later


def test_the_comparison_sees_substitutes_epochs_and_padding(alone, shards):
    """The two tests above would prove little if the run held none of these."""
    assert any(faults for *_, faults in alone.values())
    first = {p % SAMPLES: v for (s, p), v in alone.items() if schedule(s)[0] == "a" and p < SAMPLES}
    again = {p: v for (s, p), v in alone.items() if schedule(s)[0] == "a" and p >= SAMPLES}
    assert again
    sampler = StepSampler(schedule, streams(shards), 63, 64, 0, 1)
    assert not any(any(request.valid) for request in sampler)
    # Another epoch: another row, and another crop where the row is the same.
    assert sum(first[p % SAMPLES][0] == v[0] for p, v in again.items()) <= len(again) // 4


def test_seed_and_position_decide_the_pixels(shards):
    """The same picture at two positions, or in two tasks, is cropped differently."""
    found = load(shards, 1, 1)
    other = load(shards, 1, 1, seed=8)
    by_row: dict[int, set[bytes]] = {}
    for row, _, pixels, _, _ in [*found.values(), *other.values()]:
        by_row.setdefault(row, set()).add(pixels)
    visits = np.array([value[0] for value in [*found.values(), *other.values()]])
    repeated = [row for row in by_row if (visits == row).sum() > 1]
    assert len(repeated) > 50
    assert all(len(by_row[row]) == (visits == row).sum() for row in repeated)
