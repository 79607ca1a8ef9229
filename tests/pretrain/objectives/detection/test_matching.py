"""Costs and assignments against reference values, transformers, and one image at a time."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher

from pretrain.models.regions.decoder import Predictions
from pretrain.objectives.detection.matching import COST_WEIGHTS, assign, match, pair_costs
from pretrain.objectives.detection.points import features_at, masks_at
from pretrain.objectives.detection.targets import Targets
from tests.pretrain.objectives.detection import golden


def mask_values(tensors: dict, targets: Targets):
    """Features and labels at the reference's points, if it has masks."""
    _, features = golden.predictions(tensors)
    if features is None:
        return None, None
    points = tensors["match_points"]
    return features_at(features, points), masks_at(targets.masks, points[targets.images])


@pytest.mark.parametrize("name", golden.NAMES)
def test_reference_costs_and_assignments(name):
    tensors = golden.load(name)
    targets, (prediction, _) = golden.targets(tensors), golden.predictions(tensors)
    values = mask_values(tensors, targets)
    costs = pair_costs(prediction, targets, *values)
    expected = ["class", "box", "giou", *(["mask", "dice"] if values[0] is not None else [])]
    assert list(costs) == expected
    queries = tensors["pred_boxes"].shape[1]
    for part, cost in costs.items():
        # Only an image's own predictions and objects.
        assert cost.shape == (sum(targets.counts), queries)
        right = torch.cat([c.T for c in golden.per_image(tensors, f"cost_{part}")])
        torch.testing.assert_close(cost, right, atol=1e-10, rtol=0)
    (pairs,) = match([prediction], targets, *values)
    queries, objects = torch.cat(golden.per_image(tensors, "match_src")), []
    start = 0
    for image, count in enumerate(targets.counts):
        objects.append(tensors[f"match_tgt.{image}"] + start)
        start += count
    assert torch.equal(pairs.queries, queries) and torch.equal(pairs.targets, torch.cat(objects))
    assert torch.equal(pairs.images, targets.images) and pairs.counts == targets.counts


def random_case(counts: list[int], queries: int = 20, classes: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    batch, total = len(counts), sum(counts)
    prediction = Predictions(
        4 * rand(batch, queries, classes) - 2,
        rand(batch, queries, 4) * 0.5 + 0.2,
        4 * rand(batch, queries, 6) - 2,
    )
    targets = Targets(
        boxes=rand(total, 4) * 0.5 + 0.2,
        labels=torch.randint(classes, (total,), generator=generator),
        images=torch.arange(batch).repeat_interleave(torch.tensor(counts)),
        counts=tuple(counts),
        annotated=torch.ones(batch, dtype=torch.bool),
        crowd_boxes=torch.zeros(batch, 0, 4),
        crowd_labels=torch.zeros(batch, 0, dtype=torch.int64),
        masks=rand(total, 8, 8) > 0.5,
    )
    return prediction, targets, 2 * rand(batch, 8, 8, 6) - 1


def of_transformers(prediction: Predictions, targets: Targets, features: torch.Tensor):
    outputs = {
        "logits": prediction.logits,
        "pred_boxes": prediction.boxes,
        "pred_masks": prediction.masks(features),
    }
    split = zip(
        *(x.split(list(targets.counts)) for x in (targets.labels, targets.boxes, targets.masks)),
        strict=True,
    )
    labels = [{"class_labels": a, "boxes": b, "masks": c} for a, b, c in split]
    return outputs, labels


def assert_same(pairs, right) -> None:
    start, rows = 0, []
    for count, (queries, objects) in zip(pairs.counts, right, strict=True):
        rows.append((queries, objects, start))
        start += count
    assert torch.equal(pairs.queries, torch.cat([q for q, _, _ in rows]))
    assert torch.equal(pairs.targets, torch.cat([o + s for _, o, s in rows]))


def test_boxes_are_matched_as_by_transformers():
    prediction, targets, features = random_case([3, 0, 9, 1])
    theirs = DeformableDetrHungarianMatcher(4, 5, 2)
    (pairs,) = match([prediction], targets)
    assert_same(pairs, theirs(*of_transformers(prediction, targets, features)))


def test_masks_are_matched_as_by_transformers(monkeypatch):
    """Theirs takes random points, and labels of the nearest pixel: at centres of pixels that is
    the same as ours."""
    prediction, targets, features = random_case([3, 2, 9, 1])
    centres = (torch.randint(8, (1, 30, 2), generator=torch.Generator().manual_seed(4)) + 0.5) / 8
    monkeypatch.setattr(torch, "rand", lambda *_, **__: centres)
    outputs, labels = of_transformers(prediction, targets, features)
    right = RfDetrHungarianMatcher(4, 5, 2, 16, 5, 5)(outputs, labels, group_detr=1)
    points = centres.expand(len(targets.counts), -1, -1)
    values = features_at(features, points), masks_at(targets.masks, points[targets.images])
    (pairs,) = match([prediction], targets, *values)
    assert_same(pairs, right)
    (boxes_alone,) = match([prediction], targets)
    assert not torch.equal(boxes_alone.queries, pairs.queries)


def test_all_layers_reach_the_host_in_one_copy(monkeypatch):
    cases = [random_case([3, 0, 25, 1], seed=seed) for seed in range(4)]
    targets, copies, plain = cases[0][1], [], torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or plain(self)
    )
    found = match([prediction for prediction, _, _ in cases], targets)
    assert copies == [(4, 29, 20)]
    for (prediction, _, _), pairs in zip(cases, found, strict=True):
        costs = pair_costs(prediction, targets)
        total = sum(COST_WEIGHTS[name] * cost for name, cost in costs.items()).numpy()
        assert pairs.counts == (3, 0, 20, 1)  # 25 objects, 20 predictions
        start = first = 0
        for image, (count, paired) in enumerate(zip(targets.counts, pairs.counts, strict=True)):
            own = slice(first, first + paired)
            query, place = linear_sum_assignment(total[start : start + count].T)
            assert pairs.images[own].eq(image).all()
            assert pairs.queries[own].tolist() == query.tolist()
            assert pairs.targets[own].tolist() == (place + start).tolist()
            start, first = start + count, first + paired


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_what_is_not_finite_is_assigned_nevertheless(bad, share):
    costs = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(0))
    hit = torch.rand(costs.shape, generator=torch.Generator().manual_seed(1)) < share
    pairs = assign(torch.where(hit, bad, costs), [3, 4])
    for layer, each in enumerate(pairs):
        assert each.counts == (3, 4) and sorted(each.targets.tolist()) == list(range(7))
        for own in each.queries.split([3, 4]):
            assert len(set(own.tolist())) == len(own)
        if share < 1:  # the finite costs suffice
            assert not hit[layer, each.targets, each.queries].any()


def test_nothing_to_match():
    prediction, targets, _ = random_case([0, 0])
    (pairs,) = match([prediction], targets)
    assert pairs.counts == (0, 0) and len(pairs.images) == len(pairs.queries) == 0


def test_assignments_do_not_depend_on_other_images():
    prediction, targets, _ = random_case([3, 5])
    (both,) = match([prediction], targets)
    rows = targets.images == 1
    alone = Targets(
        targets.boxes[rows],
        targets.labels[rows],
        torch.zeros(5, dtype=torch.int64),
        (5,),
        targets.annotated[1:],
        targets.crowd_boxes[1:],
        targets.crowd_labels[1:],
    )
    (one,) = match([Predictions(*(x[1:] for x in prediction))], alone)
    np.testing.assert_array_equal(both.queries[3:], one.queries)
    np.testing.assert_array_equal(both.targets[3:] - 3, one.targets)
