"""From damaged shards to metrics: a sample counts once on any number of ranks, padding never."""

import numpy as np
import pytest
import torch

from data_pipeline.filters.selection import Selection
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.faults import FaultLimits
from data_pipeline.loader.loader import EvaluationLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.labels import LabelDataSettings, LabelProcessor
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from pretrain.objectives.objective import EvaluationContext
from tests.data_pipeline.photos import jpeg, picture
from tests.pretrain.objectives.pair_models import CLASSES, pair_model

SAMPLES, BAD = 37, (0, 11, 36)
NAMES = ("loss", "cross_entropy", "top1", "top5", "images", "labelled")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("held_out")
    with ShardWriter(folder, "test", max_samples=10) as writer:
        for number in range(SAMPLES):
            image = jpeg(picture(number, 16, 16))
            members = {"jpg": image[:40] if number in BAD else image}
            if number % 5:  # the others have no label
                members["cls"] = b"%d" % (number % CLASSES)
            writer.write(f"{number:04d}", members)
    return ShardSet.open(folder)


def batches(shards, rank: int, world: int, micro_batch: int, **options) -> list[dict]:
    settings = LabelDataSettings(
        shards=["unused"], classes=CLASSES, image=ImageSettings(size=16, mode="center_crop")
    )
    stream = TaskStream(
        "held_out",
        SampleReader(shards),
        None,
        LabelProcessor(settings, train=False),
        0,
        micro_batch * world,
        micro_batch,
        options.pop("selection", None),
    )
    limits = FaultLimits(max_bad_fraction=1.0)
    return list(EvaluationLoader(stream, rank, world, limits=limits, **options))


def metrics(shards, world: int, micro_batch: int, **options) -> dict[str, float]:
    """Metrics over `world` ranks, which run one after the other, twice, to see all shares."""
    model = pair_model()
    loaded = [batches(shards, rank, world, micro_batch, **options) for rank in range(world)]
    shares: list = []

    def run(rank: int, reduce) -> dict[str, float]:
        return model.objectives["classify"].evaluate(
            model.encoders, loaded[rank], EvaluationContext(torch.device("cpu"), reduce=reduce)
        )[0]

    for rank in range(world):
        run(rank, lambda mine: [shares.append(mine), mine][1:])
    found = [run(rank, lambda mine: shares) for rank in range(world)]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 4), (3, 6), (5, 2), (40, 8)])
def test_metrics_do_not_depend_on_the_world(shards, world, micro_batch):
    alone = metrics(shards, 1, 1)  # no batch of one sample is padded
    assert alone["images"] == SAMPLES - len(BAD)
    assert alone["labelled"] == pytest.approx(
        sum(bool(n % 5) for n in range(SAMPLES) if n not in BAD) / alone["images"]
    )
    found = metrics(shards, world, micro_batch)
    for name in NAMES:
        assert found[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("world", [1, 3])
def test_a_part_of_the_samples(shards, world):
    """11 of them, evenly spread: rows 0 (bad), 3, 6, 10, ..."""
    rows = [row * SAMPLES // 11 for row in range(11)]
    good = [row for row in rows if row not in BAD]
    assert len(good) == 10
    found = metrics(shards, world, 4, max_samples=11)
    kept = Selection.everything(SAMPLES).without(np.setdiff1d(np.arange(SAMPLES), good))
    expected = metrics(shards, 1, 1, selection=kept)
    assert found["images"] == expected["images"] == 10
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
