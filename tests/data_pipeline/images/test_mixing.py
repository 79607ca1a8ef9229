"""Mixup and CutMix: the draws, and that partners share them in any world."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.images.mixing import ALONE, MixingSettings, draw_mix
from data_pipeline.loader.loader import LoaderSettings, StepLoader, TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import jpeg, picture
from tests.data_pipeline.samples.test_labels import fields

DRAWS = 4000


def draws(**settings):
    mixing = MixingSettings(**settings)
    return [draw_mix(mixing, sample_rng(0, "t", n, "mix")) for n in range(DRAWS)]


def area(box: tuple[float, ...]) -> float:
    top, left, bottom, right = box
    return (bottom - top) * (right - left)


def test_mixup_shares_are_beta():
    found = np.array([mix.share for mix in draws(mixup_alpha=0.8, cutmix_alpha=0)])
    assert abs(found.mean() - 0.5) < 0.02
    assert abs(found.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # of Beta(a, a)


def test_cutmix_boxes_lie_inside_and_have_the_area_of_the_draw_unless_cut():
    found = draws(mixup_alpha=0, cutmix_alpha=1.0)
    assert all(mix.share == 0 for mix in found)
    boxes = np.array([mix.box for mix in found])
    assert boxes.min() >= 0 and boxes.max() <= 1
    # Beta(1, 1) is uniform, so an uncut box has area u; the border takes some of it away.
    uncut = ((boxes > 0) & (boxes < 1)).all(axis=1)
    areas = np.array([area(box) for box in boxes])
    assert 0.05 < areas.mean() < 0.5 and uncut.mean() > 0.1
    sides = boxes[uncut][:, 2:] - boxes[uncut][:, :2]
    np.testing.assert_allclose(sides[:, 0], sides[:, 1], atol=1e-12)  # the shape of the image


def test_probabilities():
    found = draws(probability=0.75)
    alone = sum(mix == ALONE for mix in found)
    cut = sum(area(mix.box) > 0 for mix in found)
    assert abs(alone / DRAWS - 0.25) < 0.03
    assert abs(cut / DRAWS - 0.75 * 0.5) < 0.03


def test_nothing_to_mix_is_refused():
    with pytest.raises(ValidationError, match="both 0"):
        MixingSettings(mixup_alpha=0, cutmix_alpha=0)


def batches(folder, world: int, micro_batch: int) -> dict[int, tuple]:
    """Position -> its mix, over all ranks."""
    reader = SampleReader(ShardSet.open(str(folder)))
    stream = TaskStream(
        "classify", reader, Order.plan(12, 0, 8), fields(mixing=MixingSettings()), 5, 8, micro_batch
    )
    found = {}
    for rank in range(world):
        loader = StepLoader(
            {"classify": stream},
            lambda step: ("classify", step),
            LoaderSettings(workers=0),
            rank,
            world,
            0,
            3,
        )
        for batch in (b for window in loader for b in window.micro_batches):
            mixes = torch.cat([batch["mix_share"][:, None], batch["mix_box"]], dim=1).tolist()
            for position, mix in zip(batch["position"].tolist(), mixes, strict=True):
                if position >= 0:
                    found[position] = tuple(mix)
    return found


def test_partners_share_a_draw_in_any_world(tmp_path):
    with ShardWriter(tmp_path, "a", max_samples=12) as writer:
        for number in range(12):
            members = {"jpg": jpeg(picture(number)), "cls": b"%d" % (number % 5)}
            writer.write(f"{number:03d}", members)
    alone = batches(tmp_path, 1, 8)
    assert len(alone) == 24 and len(set(alone.values())) == 12
    for position, mix in alone.items():
        assert alone[position ^ 1] == mix
    assert batches(tmp_path, 3, 2) == alone


def test_evaluation_does_not_mix():
    assert "mix_share" not in fields(train=False, mixing=MixingSettings()).collate([None], [False])
