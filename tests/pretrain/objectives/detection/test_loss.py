"""Losses against reference values, transformers and plain formulas; and as shares."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)

from pretrain.models.regions.decoder import Predictions
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.detection.denoising import noisy_boxes
from pretrain.objectives.detection.loss import DetectionLoss, PointValues, mask_losses
from pretrain.objectives.detection.matching import Pairs, match
from pretrain.objectives.detection.points import draw_points, features_at, masks_at
from pretrain.objectives.detection.settings import DetectionLossSettings
from pretrain.objectives.detection.targets import Targets, box_count
from tests.nondeterministic_operators import watched_order
from tests.pretrain.models.regions.region_models import (
    CANVAS,
    box_batch,
    maps_of,
    small_regions,
)
from tests.pretrain.objectives.detection import golden

TERMS = ("class", "box", "giou", "mask", "dice")
REFERENCE = dict(zip(TERMS, ("ce", "bbox", "giou", "mask", "dice"), strict=True))


def no_masks(batch: int, width: int, dtype: torch.dtype) -> PointValues:
    return PointValues(torch.zeros(batch, 1, width, dtype=dtype), None, 1, 0)


def reference_pairs(tensors: dict, targets: Targets) -> Pairs:
    starts = torch.tensor([0, *targets.counts]).cumsum(0)
    objects = [t + s for t, s in zip(golden.per_image(tensors, "match_tgt"), starts, strict=False)]
    queries = torch.cat(golden.per_image(tensors, "match_src"))
    return Pairs(targets.images, queries, torch.cat(objects), targets.counts)


@pytest.mark.parametrize("eps, prefix", [(0.0, ""), (1e-6, "giou_eps1e-6.")])
@pytest.mark.parametrize("name", golden.NAMES)
def test_reference_losses(name, eps, prefix):
    tensors = golden.load(name)
    targets, (prediction, features) = golden.targets(tensors), golden.predictions(tensors)
    pairs = reference_pairs(tensors, targets)
    batch, queries, _ = prediction.logits.shape
    found = DetectionLoss(giou_eps=eps).losses(
        prediction, targets, pairs, no_masks(batch, queries, torch.float64)
    )
    if features is not None:
        # Each pair has points of its own there, at which its mask is read alone.
        points = tensors["loss_points"]
        masks = prediction.masks(features)[pairs.images, pairs.queries]
        logits = features_at(masks[..., None], points)[..., 0]
        labels = masks_at(targets.masks[pairs.targets], points)
        found["mask"], found["dice"] = (part.sum() for part in mask_losses(logits, labels))
    for term, value in found.items():
        if f"{prefix}loss_{REFERENCE[term]}" in tensors:
            right = tensors[f"{prefix}loss_{REFERENCE[term]}"][0]
            torch.testing.assert_close(value / len(pairs.images), right, atol=1e-10, rtol=0)
    assert features is None or found["mask"] > 0


def test_losses_of_boxes_are_those_of_transformers():
    targets = Targets.from_batch(box_batch([3, 0, 7]))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 12, 5, generator=generator, requires_grad=True)
    boxes = torch.rand(3, 12, 4, generator=generator) * 0.5 + 0.2
    prediction = Predictions(logits, boxes.requires_grad_(), torch.zeros(3, 12, 8))
    (pairs,) = match([prediction], targets)
    found = DetectionLoss().losses(prediction, targets, pairs, no_masks(3, 8, torch.float32))
    theirs = DeformableDetrImageLoss(
        DeformableDetrHungarianMatcher(4, 5, 2), 5, 0.25, ["labels", "boxes"]
    )
    split = zip(targets.labels.split([3, 0, 7]), targets.boxes.split([3, 0, 7]), strict=True)
    right = theirs(
        {"logits": logits, "pred_boxes": boxes}, [{"class_labels": a, "boxes": b} for a, b in split]
    )
    for term in TERMS[:3]:
        ours, other = found[term] / 10, right[f"loss_{REFERENCE[term]}"]
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)
        where = logits if term == "class" else boxes
        gradients = [torch.autograd.grad(x, where, retain_graph=True)[0] for x in (ours, other)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def shares(model, batch: dict, positions: list[int], total: float, loss=None, queries: int = 6):
    """A step's share of a micro-batch, as an objective computes it."""
    targets = Targets.from_batch(batch).without_classes()
    draws = SampleDraws(3, "detect", torch.tensor(positions))
    denoising = noisy_boxes(targets, draws, queries)
    regions = model(batch["maps"], CANVAS, None, denoising.known)
    points = draw_points(draws, points=40)
    return (loss or DetectionLoss()).shares(regions, targets, points, total, denoising)


def whole_batch(counts=(2, 0, 5, 1), crowds=(0, 0, 1, 1)) -> dict:
    batch = box_batch(list(counts), list(crowds))
    return batch | {"maps": maps_of(len(counts))}


def part_of(batch: dict, start: int, stop: int) -> dict:
    """Some images, as if the others were in another micro-batch."""
    counts = batch["counts"].tolist()
    most = max(counts[start:stop])
    rows = slice(sum(counts[:start]), sum(counts[:stop]))
    found = {name: x[start:stop] for name, x in batch.items() if name not in ("maps", "masks")}
    for name in ("boxes", "labels", "crowd"):
        found[name] = found[name][:, :most]
    maps = [x[start:stop] for x in batch["maps"]]
    return found | {"maps": maps, "masks": batch["masks"][rows]}


def test_shares_add_up_however_the_batch_is_divided():
    """With noise, points and groups of the samples themselves; one part has no boxes at all."""
    batch = whole_batch()
    batch["maps"] = [x.double() for x in batch["maps"]]
    total = box_count(batch)
    assert total == 6
    sums, gradients = [], []
    for parts in ([(0, 4)], [(0, 1), (1, 2), (2, 4)]):
        model = small_regions().double()
        summed: dict[str, torch.Tensor] = {}
        for start, stop in parts:
            found = shares(model, part_of(batch, start, stop), list(range(start, stop)), total)
            found["loss"].backward()
            summed = {k: summed.get(k, 0.0) + v.detach() for k, v in found.items()}
        sums.append(summed)
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if not n.startswith("tokens.")}
        )
    assert set(sums[0]) == {"loss", *TERMS, "denoising", "unmatched"}
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], atol=1e-6, rtol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-9, rtol=1e-6)


def test_a_rank_without_boxes_runs_all_modules():
    model = small_regions()
    batch = whole_batch((0, 0), (0, 0)) | {"annotated": torch.tensor([True, False])}
    found = shares(model, batch, [0, -1], 17)
    found["loss"].backward()
    assert found["loss"].isfinite() and found["class"] > 0
    assert all(found[name] == 0 for name in (*TERMS[1:], "denoising", "unmatched"))
    modules = [(n, p) for n, p in model.named_parameters() if not n.startswith("tokens.")]
    assert [n for n, p in modules if p.grad is None] == []
    assert not model.predictor.mask_embed.layers[-1].weight.grad.any()
    assert not model.predictor.label_enc.weight.grad.any()
    assert model.predictor.class_embed.weight.grad.any()


def test_nothing_is_said_of_images_that_nobody_has_looked_at():
    batch = whole_batch((2, 0), (0, 0)) | {"annotated": torch.tensor([True, False])}
    model = small_regions()
    model.predictor.class_embed.bias.data.zero_()  # so that wrong scores cost something
    both = shares(model, batch, [0, 1], 2)
    alone = shares(model, part_of(batch, 0, 1), [0], 2)
    torch.testing.assert_close(both["loss"], alone["loss"], atol=1e-5, rtol=1e-5)
    looked = shares(model, batch | {"annotated": torch.tensor([True, True])}, [0, 1], 2)
    assert looked["class"] > both["class"] + 0.1


def test_no_prediction_is_wrong_for_what_a_crowd_covers():
    """The crowd of class 1 fills the left half."""
    batch = box_batch([2], [1])
    batch["boxes"][0, 1] = torch.tensor([0.0, 0.0, CANVAS[1] / 2, CANVAS[0]])
    batch["labels"][0] = torch.tensor([0, 1])
    targets = Targets.from_batch(batch)
    assert targets.counts == (1,) and len(targets.masks) == 1
    left, right = [0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]
    boxes = torch.tensor([[targets.boxes[0].tolist(), left, right]])
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    pairs = Pairs(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)), (1,))
    prediction = Predictions(logits, boxes, torch.zeros(1, 3, 4))
    values = no_masks(1, 4, torch.float32)
    DetectionLoss().losses(prediction, targets, pairs, values)["class"].backward()
    assert (logits.grad[0, 1] != 0).tolist() == [True, False]
    assert (logits.grad[0, 2] != 0).all()
    # What is paired is judged wherever it lies.
    placed = replace(
        targets,
        crowd_boxes=torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]),
        crowd_labels=torch.tensor([[0]]),
    )
    (gradient,) = torch.autograd.grad(
        DetectionLoss().losses(prediction, placed, pairs, values)["class"], logits
    )
    assert (gradient[0, :, 0] != 0).tolist() == [True, False, False]
    assert (gradient[0, :, 1] != 0).all()


def test_masks_are_compared_where_they_are_least_certain():
    """Against whole masks, read by torch at the chosen points."""
    model, batch = small_regions(), whole_batch((2, 1), (0, 0))
    targets = Targets.from_batch(batch).without_classes()
    draws = SampleDraws(3, "detect", torch.arange(2))
    points = draw_points(draws, points=40)
    assert [x.shape[1] for x in points[:3]] == [40, 120, 10] and points.uncertain == 30
    with torch.no_grad():
        regions = model(batch["maps"], CANVAS)
        found = DetectionLoss().shares(regions, targets, points, 3)
        read = features_at(regions.mask_features, points.matching)
        labels = masks_at(targets.masks, points.matching[targets.images])
        pairs = match(regions.predictions, targets, read, labels)[-1]
        masks = regions.predictions[-1].masks(regions.mask_features)
    mask = dice = 0.0

    def at(values, places):
        return F.grid_sample(
            values[None, None].float(), 2 * places[None, None] - 1, align_corners=False
        )[0, 0, 0]

    for image, query, row in zip(*pairs[:3], strict=True):
        own, label = masks[image, query], targets.masks[row]
        candidates = points.candidates[image]
        order = at(own, candidates).abs().argsort()[:30]
        places = torch.cat([candidates[order], points.free[image]])
        x, y = at(own, places), at(label, places)
        mask += F.binary_cross_entropy_with_logits(x, y)
        p = x.sigmoid()
        dice += 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    torch.testing.assert_close(found["mask"], mask / 3, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["dice"], dice / 3, atol=1e-5, rtol=1e-4)


def test_data_without_masks_leaves_masks_alone():
    model, batch = small_regions(), whole_batch((2, 1), (0, 0))
    del batch["masks"]
    found = shares(model, batch, [0, 1], 3)
    found["loss"].backward()
    assert found["mask"] == found["dice"] == 0 < found["box"]
    gradient = model.predictor.mask_embed.layers[0].weight.grad
    assert gradient is not None and not gradient.any()


def test_more_objects_than_queries_are_counted():
    model, batch = small_regions(queries=4, kept=2), whole_batch((6, 1), (0, 0))
    found = shares(model, batch, [0, 1], 7)
    torch.testing.assert_close(found["unmatched"], torch.tensor(2 / 7))


def test_what_is_not_finite_reaches_the_loss_and_stops_nobody():
    model, batch = small_regions(), whole_batch((2, 1), (0, 0))
    with torch.no_grad():
        model.predictor.enc_output.weight.fill_(torch.nan)
    found = shares(model, batch, [0, 1], 3)
    found["loss"].backward()
    assert not found["loss"].isfinite()


def test_orders_of_addition_are_fixed():
    model, batch = small_regions(), whole_batch((2, 1), (0, 0))
    with watched_order() as found:
        share = shares(model, batch, [0, 1], 3)["loss"]
        regions = model(batch["maps"], CANVAS)
        tokens = model.image_tokens(batch["maps"], regions, CANVAS).tokens
        (share + tokens.square().sum()).backward()
    assert found == set()


def test_settings_build_the_loss():
    loss = DetectionLossSettings(weights={"dice_weight": 0.0}, giou_eps=1e-6).build()
    assert loss.weights == {"class": 4, "box": 5, "giou": 2, "mask": 5, "dice": 0}
    assert loss.costs == {"class": 4, "box": 5, "giou": 2, "mask": 5, "dice": 5}
    assert (loss.giou_eps, loss.alpha, loss.gamma, loss.crowd_cover) == (1e-6, 0.25, 2, 0.5)
