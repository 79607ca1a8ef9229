"""Known boxes with noise: whose they are, how far they are moved, and by what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.detection.denoising import noisy_boxes
from pretrain.objectives.detection.targets import Targets, box_count
from tests.pretrain.models.regions.region_models import CANVAS, box_batch


def draws(*positions: int) -> SampleDraws:
    return SampleDraws(1, "detect", torch.tensor(positions))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 20))
def test_each_group_holds_each_object_once(counts, queries):
    targets = Targets.from_batch(box_batch(counts))
    found = noisy_boxes(targets, draws(*range(len(counts))), queries)
    known, pairs = found.known, found.pairs
    groups = [queries // count if count else 0 for count in counts]
    assert pairs.counts == tuple(g * count for g, count in zip(groups, counts, strict=True))
    assert known.boxes.shape == (len(counts), max(1, *pairs.counts), 4)
    seen = [
        (image.item(), known.groups[image, slot].item(), row.item())
        for image, slot, row in zip(*pairs[:3], strict=True)
    ]
    first, right = 0, []
    for image, count in enumerate(counts):
        right += [
            (image, group, first + place)
            for group in range(groups[image])
            for place in range(count)
        ]
        first += count
    assert seen == right
    assert int((known.groups >= 0).sum()) == len(right)
    # Of each object the weights sum up to 1.
    of_object = torch.zeros(len(targets.boxes)).index_add(0, pairs.targets, found.weights)
    given_any = torch.tensor([groups[image] > 0 for image in targets.images.tolist()])
    torch.testing.assert_close(of_object, given_any.float())


def test_noise_is_of_the_size_of_the_box():
    targets = Targets.from_batch(box_batch([4, 2]))
    found = noisy_boxes(targets, draws(5, 6), 4_000)
    own = found.known.boxes[found.pairs.images, found.pairs.queries]
    right = targets.boxes[found.pairs.targets]
    sides = right[:, 2:]
    inside = (own > 0).all(1) & (own < 1).all(1)  # beyond that they are cut
    change = (own - right)[inside] / torch.cat([sides / 2, sides], 1)[inside]
    assert 0.39 < change.abs().max() <= 0.4001
    assert change.mean().abs() < 0.01 and change.std() == pytest.approx(0.8 / 12**0.5, rel=0.02)
    assert (
        noisy_boxes(targets, draws(5, 6), 8, noise=0.0).known.boxes[0, :4].equal(targets.boxes[:4])
    )


def test_noise_and_groups_belong_to_the_sample():
    """Alone, beside a fuller image, or elsewhere in the batch."""
    batch = box_batch([2, 9])
    both = noisy_boxes(Targets.from_batch(batch), draws(7, 8), 20)
    one = {name: x[:1] for name, x in batch.items()} | {"masks": batch["masks"][:2]}
    alone = noisy_boxes(Targets.from_batch(one), draws(7), 20)
    assert torch.equal(both.known.boxes[0], alone.known.boxes[0])
    assert torch.equal(both.known.groups[0], alone.known.groups[0])
    other = noisy_boxes(Targets.from_batch(one), draws(9), 20)
    assert not torch.equal(other.known.boxes, alone.known.boxes)


def test_targets_of_a_batch():
    batch = box_batch([3, 0, 2], [1, 0, 1])
    targets = Targets.from_batch(batch)
    assert targets.counts == (2, 0, 1) and box_count(batch) == 3
    assert targets.images.tolist() == [0, 0, 2] and targets.masks.shape == (3, *CANVAS)
    height, width = CANVAS
    for row, (image, place) in enumerate([(0, 0), (0, 1), (2, 0)]):
        x0, y0, x1, y1 = batch["boxes"][image, place].tolist()
        right = [
            (x0 + x1) / 2 / width,
            (y0 + y1) / 2 / height,
            (x1 - x0) / width,
            (y1 - y0) / height,
        ]
        assert targets.boxes[row].tolist() == pytest.approx(right, abs=1e-6)
        assert targets.labels[row] == batch["labels"][image, place]
        assert torch.equal(targets.masks[row], batch["masks"][[0, 1, 3][row]])
    assert targets.crowd_boxes.shape == (3, 1, 4) and not targets.crowd_boxes[1].any()
    assert targets.crowd_labels[:, 0].tolist() == [batch["labels"][0, 2], -1, batch["labels"][2, 1]]
    plain = targets.without_classes()
    assert not plain.labels.any() and plain.crowd_labels[:, 0].tolist() == [0, -1, 0]
