"""Reading ahead of a run: what the simulation says, done; and batches that do not know of it."""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cache.blocks import Blocks
from data_pipeline.cache.cache import CachedShards, CacheSettings
from data_pipeline.cache.cache_folder import CacheFolder
from data_pipeline.cache.cache_plan import simulate
from data_pipeline.cache.future import NodeReads
from data_pipeline.cache.prefetch import Prefetcher
from data_pipeline.cache.read_ahead import ReadAhead, plannable_bytes
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.order.step_sampler import Schedule, StepSampler
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.cache.test_cache import IMPATIENT, KIB, QUICK, blocks_in
from tests.data_pipeline.cache.test_cache_folder import bytes_on_disk, other_files
from tests.data_pipeline.loader.test_loader import contents, schedule
from tests.data_pipeline.photos import pack, stream
from tests.data_pipeline.storage.faulty_server import FaultyServer, status

BLOCK = 8 * 1024  # bytes of a block in `equal_shards`, samples of 1,024 bytes


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "indices"))


def equal_shards(folder: Path, count: int, first: int = 0, per_shard: int = 64) -> ShardSet:
    """Samples of 1,024 bytes each, from number `first` on."""
    with ShardWriter(folder, "train", max_samples=per_shard) as writer:
        for number in range(first, first + count):
            writer.write(f"{number:06d}", {"bin": b"%6d" % number * 80})
    return ShardSet.open(folder)


class Task:
    def __init__(self, global_batch: int, micro_batch: int, order, shards: ShardSet) -> None:
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.order, self.shards = order, shards


def small_order(rows: int, seed: int) -> Order:
    """Lanes and chunks that are to these few rows what the usual ones are to millions."""
    return Order(rows, seed, row_lanes=8, phases=2, chunk_rows=16)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    """Two tasks that share a shard; the second mixes two sources."""
    folder = tmp_path_factory.mktemp("equal")
    one = equal_shards(folder / "one", 512)
    two = equal_shards(folder / "two", 320, 1000)
    both = ShardSet([*two.shards, one.shards[3]])
    mixed = MixedOrder({"x": small_order(320, 1), "y": small_order(64, 2)}, [3.0, 1.0], 3)
    return {"a": Task(16, 4, small_order(512, 4), one), "b": Task(8, 2, mixed, both)}


def schedule_of(tasks) -> Schedule:
    """Two tasks in turn, or one alone."""
    return schedule if len(tasks) == 2 else lambda step: ("a", step)


def sampler_of(tasks, start: int, stop: int, world: int = 1) -> StepSampler:
    return StepSampler(schedule_of(tasks), tasks, 0, world, start, stop)


def shards_of(tasks) -> dict[str, ShardSet]:
    return {name: task.shards for name, task in tasks.items()}


def rows_of(tasks) -> dict:
    return {name: task.order.rows for name, task in tasks.items()}


def read_ahead(tasks, settings, start=0, stop=150, world=1, ranks=range(1)) -> ReadAhead:
    return ReadAhead(
        shards_of(tasks), rows_of(tasks), sampler_of(tasks, start, stop, world), ranks, settings
    )


def settle(ahead: ReadAhead) -> None:
    """Let it do all that it can do before the run goes on."""
    idle = 0
    while idle < 2:
        idle = 0 if ahead.work() else idle + 1


def node_reads(tasks, start, stop, world, ranks, block_bytes=BLOCK) -> NodeReads:
    blocks = Blocks(shards_of(tasks), block_bytes)
    return NodeReads(sampler_of(tasks, start, stop, world), rows_of(tasks), blocks, ranks)


def rows_read(tasks, step: int, world: int, ranks) -> dict[str, list[int]]:
    """What loaders of these ranks read at a step."""
    rows: dict[str, list[int]] = {}
    for rank in ranks:
        for request in StepSampler(schedule_of(tasks), tasks, rank, world, step, step + 1):
            positions = np.array([p for p in request.positions if p >= 0], dtype=np.int64)
            found = tasks[request.task].order.rows(positions).tolist()
            rows.setdefault(request.task, []).extend(found)
    return rows


@pytest.mark.parametrize(("world", "ranks"), [(1, range(1)), (4, range(2, 4)), (6, range(0, 3))])
def test_a_node_knows_what_its_ranks_read(tasks, world, ranks):
    reads = node_reads(tasks, 5, 60, world, ranks)
    found = {step: set() for step in range(5, 60)}
    for _, steps, blocks in reads.steps(5, 60):
        for step, block in zip(steps.tolist(), blocks.tolist(), strict=True):
            found[step].add(block)
    for step in range(5, 60):
        read = rows_read(tasks, step, world, ranks)
        expected = [reads.blocks.of_rows(t, np.array(rows)).tolist() for t, rows in read.items()]
        assert found[step] == {block for each in expected for block in each}


def run_through(tasks, settings, steps, world=1, ranks=range(1), ahead=None) -> tuple[int, int]:
    """Read what the ranks read, the read-ahead one step before them.

    Returns blocks that it downloaded, and reads that missed them.
    """
    ahead = ahead or read_ahead(tasks, settings, steps.start, steps.stop, world, ranks)
    readers = {
        name: SampleReader(task.shards, CachedShards(task.shards, settings))
        for name, task in tasks.items()
    }
    folder = Path(settings.folder)
    for step in steps:
        ahead.advance(step)
        settle(ahead)
        assert bytes_on_disk(folder) <= settings.max_bytes
        for name, rows in rows_read(tasks, step, world, ranks).items():
            for row in rows:
                assert readers[name].read(row).row == row
        assert bytes_on_disk(folder) <= settings.max_bytes
    ahead.close()
    assert not ahead.messages and not other_files(folder)
    missed = [reads.source.counters["cache_misses"] for reads in readers.values()]
    return ahead.fetched_blocks, sum(missed)


@pytest.mark.parametrize(
    ("blocks_in_cap", "world", "ranks"),
    [(40.9, 1, range(1)), (70.9, 1, range(1)), (200.0, 1, range(1)), (40.9, 4, range(1, 3))],
)
def test_the_cache_does_what_the_simulation_says(tmp_path, tasks, blocks_in_cap, world, ranks):
    gib = blocks_in_cap * BLOCK / 2**30
    settings = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=gib, block_mib=BLOCK / 2**20, read_ahead_steps=4
    )
    steps = range(0, 100)
    fetched, missed = run_through(tasks, settings, steps, world, ranks)
    expected = simulate(
        node_reads(tasks, 0, 100, world, ranks),
        plannable_bytes(settings.max_bytes),
        0,
        100,
        read_ahead_steps=4,
    )
    assert (fetched, missed) == (expected.fetched, 0)
    if blocks_in_cap == 200:  # everything fits
        assert fetched == len(
            np.unique(
                np.concatenate(
                    [
                        blocks
                        for _, _, blocks in node_reads(tasks, 0, 100, world, ranks).steps(0, 100)
                    ]
                )
            )
        )


def test_a_run_that_goes_on_elsewhere_uses_what_is_there(tmp_path, tasks):
    settings = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=BLOCK / 2**20, read_ahead_steps=4
    )
    first, _ = run_through(tasks, settings, range(0, 60))
    again, missed = run_through(tasks, settings, range(20, 60))
    assert (again, missed) == (0, 0) and first > 20
    later, missed = run_through(tasks, settings, range(50, 90))
    known = set(np.concatenate([b for _, _, b in node_reads(tasks, 0, 60, 1, [0]).steps(0, 60)]))
    new = set(np.concatenate([b for _, _, b in node_reads(tasks, 50, 90, 1, [0]).steps(50, 90)]))
    assert (later, missed) == (len(new - known), 0)


def test_blocks_of_others_go_first_and_shares_are_fair(tmp_path, tasks):
    settings = CacheSettings(
        folder=str(tmp_path / "cache"),
        max_gib=60.9 * BLOCK / 2**30,
        block_mib=BLOCK / 2**20,
        read_ahead_steps=4,
    )
    other = {"a": Task(16, 4, small_order(400, 9), equal_shards(tmp_path / "other", 400, 2000))}
    run_through(other, settings, range(0, 60))  # a run of yesterday fills the cache
    alone, missed = run_through(tasks, settings, range(0, 60))
    assert missed == 0
    expected = simulate(
        node_reads(tasks, 0, 60, 1, [0]),
        plannable_bytes(settings.max_bytes),
        0,
        60,
        read_ahead_steps=4,
    )
    assert alone <= 1.1 * expected.fetched
    ahead = read_ahead(tasks, settings, 60, 150)
    today = CacheFolder(settings.folder, settings.max_bytes)  # another run
    with ahead.folder.reading_ahead(), today.reading_ahead():
        for step in range(60, 100):
            ahead.advance(step)
            settle(ahead)
        mine = sum(size for _, size in ahead._held.values())
        assert mine <= settings.max_bytes / 2
        ahead.close()


def test_what_readers_fetched_themselves_is_found(tmp_path, tasks):
    settings = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=BLOCK / 2**20, read_ahead_steps=4
    )
    ahead = read_ahead(tasks, settings)
    settle(ahead)
    shards = tasks["a"].shards
    reads = SampleReader(shards, CachedShards(shards, settings))
    for row in range(512):
        reads.read(row)
    for step in range(40):
        ahead.advance(step)
        settle(ahead)
    read = sum(ahead.fetched_bytes.values()) + reads.source.counters["bytes_read"]
    assert read <= Blocks(shards_of(tasks), BLOCK).total_bytes
    ahead.close()


def test_faults_of_storage_and_folder_are_told(tmp_path, tasks):
    with FaultyServer(Path(tasks["a"].shards.shards[0].path).parent) as server:
        shards = ShardSet.open(server.url, IMPATIENT)
        remote = {"a": Task(16, 4, small_order(512, 4), shards)}
        settings = CacheSettings(folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=8 * KIB)
        server.always = status(503)
        ahead = read_ahead(remote, settings)
        while not ahead.messages:
            ahead.work()
        assert "/train-00000" in ahead.messages[0] and "reading ahead pauses" in ahead.messages[0]
        ahead.close()
        assert not blocks_in(settings) and not other_files(Path(settings.folder))
    (tmp_path / "file").write_bytes(b"")
    broken = settings.model_copy(update={"folder": str(tmp_path / "file" / "cache")})
    ahead = read_ahead(tasks, broken)
    ahead.work()
    assert "file/cache: Not a directory; reading ahead pauses" in ahead.messages[0]
    ahead.close()


# ---- as a process, behind a loader ---------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    pack(folder / "set", 103)
    return folder


def loader(shards, cache, start=0, stop=14, rank=0, world=1, workers=0, node=None, **options):
    """As `test_loader.loader`, through a cache."""
    streams = {
        "a": stream(shards, 12, 4, name="a"),
        "b": stream(shards, 10, 6, name="b", captions_per_image=2, caption_source="json:captions"),
    }
    if cache is not None:
        for each in streams.values():
            each.reader = SampleReader(shards, CachedShards(shards, cache))
    settings = LoaderSettings(workers=workers, cache=cache, **{"max_bad_fraction": 1.0, **options})
    return StepLoader(streams, schedule, settings, rank, world, start, stop, node_ranks=node)


def read_aheads() -> list:
    return [p for p in multiprocessing.active_children() if p.name == "read-ahead"]


@pytest.fixture(scope="module")
def uninterrupted(photos) -> dict:
    return contents(loader(ShardSet.open(photos / "set"), None))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "method", "kib"),
    [(0, "fork", 10**6), (2, "fork", 150), pytest.param(1, "spawn", 10**6, marks=pytest.mark.slow)],
)
def test_batches_do_not_know_of_the_cache(tmp_path, photos, uninterrupted, workers, method, kib):
    cache = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=kib / 2**20, block_mib=16 * KIB, read_ahead_steps=4
    )
    start = 9 if method == "spawn" else 0
    with FaultyServer(photos) as server:
        shards = ShardSet.open(server.url + "/set")
        found = {}
        for rank in range(2):
            ours = loader(
                shards,
                cache,
                start,
                rank=rank,
                world=2,
                workers=workers,
                node=range(2),
                start_method=method,
            )
            windows = iter(ours)
            first = next(windows)
            assert len(read_aheads()) == (rank == 0)
            found |= contents([first]) | contents(windows)
            assert not read_aheads()
    assert found == {key: value for key, value in uninterrupted.items() if key[0] >= start}
    assert bytes_on_disk(Path(cache.folder)) <= cache.max_bytes
    assert not other_files(Path(cache.folder))


@pytest.fixture
def answered(monkeypatch) -> None:
    """The process has heard of each step before the next: a busy machine may leave steps out."""
    advance = Prefetcher.advance

    def until_answered(self, step: int) -> dict:
        done = advance(self, step)
        assert self._connection.poll(60)
        return done

    monkeypatch.setattr(Prefetcher, "advance", until_answered)


def test_after_the_first_batch_nobody_waits(tmp_path, photos, uninterrupted, answered):
    """Storage that takes 50 ms to answer: all that is read later is there when it is wanted, but
    for some that nobody foresees, in place of bad samples."""
    cache = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=16 * KIB, read_ahead_steps=3
    )
    with FaultyServer(photos) as server:
        server.delay_s = 0.05
        shards = ShardSet.open(server.url + "/set")
        ours = loader(shards, cache)
        reads = [each.reader for each in ours.streams.values()]
        found = []
        for window in ours:
            found.append(window)
            if window.step == 0:
                first = _misses(reads), _replaced(ours)
            _train(ours, cache, window.step, 2)
        assert _misses(reads) - first[0] <= _replaced(ours) - first[1]
    assert contents(found) == uninterrupted


def _misses(reads: list[SampleReader]) -> int:
    return sum(read.source.counters["cache_misses"] for read in reads)


def _replaced(ours: StepLoader) -> int:
    return sum(count.replaced for count in ours.faults().values())


def test_what_the_process_does_is_counted(tmp_path, photos, answered):
    """Its bytes, and its failed attempts, which no reader meets."""
    cache = CacheSettings(
        folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=16 * KIB, read_ahead_steps=4
    )
    with FaultyServer(photos) as server:
        ours = loader(ShardSet.open(server.url + "/set", QUICK), cache)
        reads = [each.reader for each in ours.streams.values()]
        for window in ours:
            _train(ours, cache, window.step, 3)
            if window.step == 0:
                server.faults.extend([status(503)] * 3)
        assert not server.faults
    assert [read.source.counters["retries"] for read in reads] == [0, 0]
    assert ours.counters("a")["retries"] + ours.counters("b")["retries"] == 3
    by_readers = sum(read.source.counters["bytes_read"] for read in reads)
    in_all = ours.counters("a")["bytes_read"] + ours.counters("b")["bytes_read"]
    assert by_readers < in_all == sum(path.stat().st_size for path in blocks_in(cache))


def _train(ours: StepLoader, cache: CacheSettings, step: int, steps: int) -> None:
    """A step of training: as long as the read-ahead takes for the next `steps`."""
    positions = [p for s in range(steps) for p in ours.sampler.parts(min(step + 1 + s, 13))]
    deadline = time.monotonic() + 60
    while not all(_is_there(ours, cache, *part) for part in positions):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_there(ours: StepLoader, cache: CacheSettings, task: str, positions: range) -> bool:
    """Whether all blocks that a task reads at these positions lie in the cache."""
    source = ours.streams[task].reader.shards
    blocks = Blocks({task: source}, cache.block_bytes)
    wanted = blocks.of_rows(task, ours.streams[task].order.rows(np.array(positions)))
    folder = CacheFolder(cache.folder, cache.max_bytes)
    return all(folder.has(blocks.extent(block)[1].name) for block in set(wanted.tolist()))


def test_a_killed_read_ahead_slows_down_and_no_more(tmp_path, photos, uninterrupted, caplog):
    cache = CacheSettings(folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=16 * KIB)
    windows = iter(loader(ShardSet.open(photos / "set"), cache))
    with caplog.at_level(logging.WARNING, "omnipretrain.data"):
        found = [next(windows)]
        (process,) = read_aheads()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found += windows
    assert contents(found) == uninterrupted
    assert caplog.text.count("the read-ahead of the cache has ended (exit code -9)") == 1


def _train_forever(photos: Path, cache: CacheSettings, connection) -> None:
    windows = iter(loader(ShardSet.open(photos / "set"), cache, stop=10**6))
    next(windows)
    connection.send([process.pid for process in read_aheads()])
    time.sleep(60)


def test_a_killed_trainer_takes_the_read_ahead_along(tmp_path, photos):
    cache = CacheSettings(folder=str(tmp_path / "cache"), max_gib=1.0, block_mib=16 * KIB)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=_train_forever, args=(photos, cache, theirs))
    trainer.start()
    (pid,) = ours.recv()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    deadline = time.monotonic() + 30
    while _is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not other_files(Path(cache.folder))


def _is_alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return text.rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
