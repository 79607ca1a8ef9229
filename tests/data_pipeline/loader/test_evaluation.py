"""Evaluation: every sample once, equal batch counts, nothing substituted."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.loader.faults import FaultLimits
from data_pipeline.loader.loader import DataError, EvaluationLoader
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.remote import RemoteSettings
from tests.data_pipeline.photos import caption, damage, pack, stream
from tests.data_pipeline.storage.faulty_server import FaultyServer, status


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return pack(tmp_path_factory.mktemp("held_out"), 53)


def batches_of_ranks(shards, world, workers=0, micro_batch=4, **options) -> list[list[dict]]:
    return [
        list(
            EvaluationLoader(
                stream(shards, 4, micro_batch, train=False), rank, world, workers, **options
            )
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (20, 0)])
def test_every_sample_once_over_all_ranks(shards, world, workers):
    ranks = batches_of_ranks(shards, world, workers)
    shapes = [[b["images"].shape for b in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(ranks[0]) == -(-53 // (4 * world))
    rows = [r for batches in ranks for b in batches for r in b["row"][b["valid"]].tolist()]
    assert sorted(rows) == list(range(53))
    for batches in ranks:
        for batch in batches:
            for place, row in enumerate(batch["row"].tolist()):
                assert batch["captions"][place] == ([caption(row)] if row >= 0 else [])
                assert batch["key"][place] == (f"{row:05d}" if row >= 0 else "")


class Unread:
    """A stream of which only the requests are wanted."""

    name, order = "eval", None

    def __init__(self, n_rows: int, micro_batch: int) -> None:
        self.n_rows, self.micro_batch = n_rows, micro_batch


@given(
    n_rows=st.integers(1, 300),
    world=st.integers(1, 17),
    micro_batch=st.integers(1, 20),
    most=st.none() | st.integers(1, 400),
)
@settings(max_examples=300)
@example(n_rows=1, world=16, micro_batch=8, most=None)
@example(n_rows=17, world=4, micro_batch=4, most=None)
@example(n_rows=16, world=4, micro_batch=4, most=None)
@example(n_rows=100, world=3, micro_batch=7, most=99)
def test_requests_for_awkward_sizes_and_worlds(n_rows, world, micro_batch, most):
    loaders = [
        EvaluationLoader(Unread(n_rows, micro_batch), rank, world, max_samples=most)
        for rank in range(world)
    ]
    ranks = [list(loader.requests()) for loader in loaders]
    assert {len(requests) for requests in ranks} == {len(loaders[0])}
    for together in zip(*ranks, strict=True):  # a collective in evaluation meets on every rank
        assert len({len(request.positions) for request in together}) == 1
        assert 1 <= len(together[0].positions) <= micro_batch
        assert micro_batch % 2 or len(together[0].positions) % 2 == 0  # pairs stay whole
    rows = [
        position
        for requests in ranks
        for request in requests
        for position, valid in zip(request.positions, request.valid, strict=True)
        if valid
    ]
    wanted = min(n_rows, most or n_rows)
    assert len(rows) == len(set(rows)) == wanted and set(rows) <= set(range(n_rows))
    gaps = np.diff(sorted(rows))
    assert not gaps.size or gaps.max() - gaps.min() <= 1  # spread evenly
    padding = [
        position
        for requests in ranks
        for request in requests
        for position, valid in zip(request.positions, request.valid, strict=True)
        if not valid
    ]
    assert set(padding) <= {-1}


def test_a_part_is_spread_over_the_data_set(shards):
    (batches,) = batches_of_ranks(shards, 1, max_samples=5)
    assert [r for b in batches for r in b["row"].tolist()] == [0, 10, 21, 31, 42, -1]


def test_iterating_again_gives_the_same(shards):
    loader = EvaluationLoader(stream(shards, 4, 4, train=False), 0, 1)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 14
    assert all(
        (a["images"] == b["images"]).all() and a["key"] == b["key"]
        for a, b in zip(first, second, strict=True)
    )


def test_bad_samples_are_left_out(tmp_path):
    pack(tmp_path, 30)
    damage(tmp_path, [2, 29])
    loader = EvaluationLoader(
        stream(ShardSet.open(str(tmp_path)), 4, 4, train=False),
        0,
        1,
        limits=FaultLimits(max_bad_fraction=0.1),
    )
    for _ in range(2):
        rows = [r for b in loader for r in b["row"][b["valid"]].tolist()]
        assert rows == [row for row in range(30) if row not in (2, 29)]
        count = loader.faults()["caption"]
        assert (count.samples, count.replaced) == (30, 2)
    strict = EvaluationLoader(loader.stream, 0, 1, limits=FaultLimits(max_bad_fraction=0.0))
    with pytest.raises(DataError, match="1 of 4 samples"):
        list(strict)


def test_a_training_stream_is_refused(shards):
    with pytest.raises(ValueError, match="needs a stream without an order"):
        EvaluationLoader(stream(shards), 0, 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_what_storage_did_is_counted(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pack(tmp_path / "www", 53)
    with FaultyServer(tmp_path / "www") as server:
        quick = RemoteSettings(retry_first_wait_s=0.01)
        remote = stream(ShardSet.open(server.url, quick), 4, 4, train=False)
        loader = EvaluationLoader(remote, 0, 1, workers)
        server.faults.extend([status(503), status(429), status(500), status(403)])
        batches = list(loader)
        assert sum(int(b["valid"].sum()) for b in batches) == 53
        assert loader.faults()["caption"].replaced == 0
        assert loader.counters()["retries"] == 4
        assert loader.counters()["bytes_read"] > 0
        list(loader)
        assert loader.counters()["retries"] == 0  # of the last iteration
