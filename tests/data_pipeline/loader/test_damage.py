"""No loss is silent: over 200 damaged data sets, each loaded by one rank, by two, and resumed.

For each: either opening says which file is wrong, or every position of a step gets a whole sample,
bit for bit one of the undamaged set. A position that gets another sample than planned has a fault
that names shard, key, row and reason; the rest has none. All loads agree on every substitute.
"""

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import DataError, LoaderSettings, StepLoader
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.loader import damages
from tests.data_pipeline.photos import stream

STEPS, BATCH = 4, 12
POSITIONS = STEPS * BATCH
SETS = {"packed": damages.PACKED, "bundled": damages.BUNDLED, "foreign": damages.FOREIGN}
SEEDS = {"packed": 8, "bundled": 5, "foreign": 5}
CASES = [
    (kind, name, seed)
    for kind, kinds in SETS.items()
    for name in kinds
    for seed in range(SEEDS[kind])
]


def task(shards: ShardSet):
    """Without augmentation, so that a sample always has the same pixels; both members are used."""
    found = stream(
        shards,
        BATCH,
        4,
        name="a",
        caption_source="json:captions",
        image=ImageSettings(size=16, mode="center_crop"),
    )
    found.reader.first_wait_s = 0.001
    return found


def load(shards: ShardSet, rank: int = 0, world: int = 1, start: int = 0) -> tuple[dict, dict]:
    """Position -> (row, key, pixels, tokens), and position -> its faults."""
    settings = LoaderSettings(workers=0, max_bad_fraction=1.0, max_bad_run=1000)
    loader = StepLoader(
        {"a": task(shards)}, lambda step: ("a", step), settings, rank, world, start, STEPS
    )
    found, faults, sizes = {}, {}, []
    policy = loader._policy
    record = policy.record

    def keep(name, batch):
        for fault in batch["faults"]:
            faults.setdefault(fault.position, []).append(fault)
        record(name, batch)

    policy.record = keep
    for window in loader:
        sizes.append([len(batch["valid"]) for batch in window.micro_batches])
        for batch in window.micro_batches:
            for place in batch["valid"].nonzero().flatten().tolist():
                tokens = batch["tokens"][place][batch["loss_mask"][place]]
                found[int(batch["position"][place])] = (
                    int(batch["row"][place]),
                    batch["key"][place],
                    batch["images"][place].numpy().tobytes(),
                    tokens.tolist(),
                )
    counted = loader.faults().get("a")
    assert counted is None or counted.replaced == len(faults)
    assert len({tuple(size) for size in sizes}) == 1  # however many samples are bad
    return found, faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Kind -> an undamaged folder."""
    folder = tmp_path_factory.mktemp("whole")
    damages.pack(folder / "packed")
    damages.pack(folder / "bundled", bundle=5)
    damages.foreign(folder / "foreign")
    return {kind: folder / kind for kind in SETS}


@pytest.fixture(scope="module")
def golden(whole) -> dict[str, tuple]:
    """Key -> pixels and tokens of the undamaged sample; the same in every kind of shards."""
    found, faults = load(ShardSet.open(whole["packed"]))
    assert not faults
    return {key: content for _, key, *content in found.values()}


def damaged(tmp_path: Path, whole: dict[str, Path], kind: str, name: str, seed: int):
    """A damaged copy, and the keys that are bad in it (None: unknown)."""
    folder = tmp_path / "set"
    shutil.copytree(whole[kind], folder)
    rng = np.random.default_rng([zlib.crc32(f"{kind} {name}".encode()), seed])
    return folder, SETS[kind][name](folder, rng)


def test_there_are_more_than_200_cases():
    assert len(CASES) >= 200


def test_undamaged_sets_are_alike(whole, golden):
    for folder in whole.values():
        found, faults = load(ShardSet.open(folder))
        assert not faults and {key for _, key, *_ in found.values()} == golden.keys()
        assert all(content == golden[key] for _, key, *content in found.values())


@pytest.mark.parametrize(("kind", "name", "seed"), CASES)
def test_damage(tmp_path, monkeypatch, whole, golden, kind, name, seed):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    folder, bad = damaged(tmp_path, whole, kind, name, seed)
    try:
        shards = ShardSet.open(folder)
        planned = task(shards).order.rows(np.arange(POSITIONS)).tolist()
    except ShardError as error:
        # Nothing can be loaded by mistake; and only what a data set is opened by may be wrong.
        assert str(folder) in str(error)
        assert kind == "foreign" or name == "damaged_manifest"
        return
    try:
        found, faults = load(shards)
    except DataError as error:
        assert len(bad or shards.shards) >= damages.PER_SHARD and ".tar" in str(error)
        return
    assert sorted(found) == list(range(POSITIONS))
    for position, (row, key, *content) in found.items():
        assert content == golden[key], f"wrong bytes for {key}"
        assert (row != planned[position]) == (position in faults)
    named = [fault for own in faults.values() for fault in own]
    for fault in named:
        assert str(folder) in fault.shard and fault.reason and 0 <= fault.row < len(shards)
        assert fault.position // BATCH in range(STEPS) and fault.task == "a"
    if bad is not None:
        assert {fault.key for fault in named} - {"?"} <= bad
        loaded = {position for position, row in enumerate(planned) if damages.key(row) in bad}
        assert faults.keys() == loaded
        assert {damages.key(planned[position]) for position in faults} <= bad
    other, more = {}, {}
    for rank in range(2):
        halves = load(ShardSet.open(folder), rank, 2, start=1)
        other |= halves[0]
        more |= halves[1]
    assert other == {position: value for position, value in found.items() if position >= BATCH}
    assert more == {position: own for position, own in faults.items() if position >= BATCH}


def test_the_suite_sees_faults_of_every_kind(tmp_path, monkeypatch, whole):
    """Most damages are met in four steps, or the assertions above would hold for nothing."""
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    silent = {"flip_in_padding", "missing_index"}
    for name in damages.PACKED.keys() - silent:
        met = 0
        for seed in range(4):
            folder, _ = damaged(tmp_path / f"{name}{seed}", whole, "packed", name, seed)
            try:
                met += bool(load(ShardSet.open(folder))[1])
            except (ShardError, DataError):
                met += 1
        assert met, name
