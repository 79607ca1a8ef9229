"""Geometry of boxes against transformers and plain loops."""

import math

import pytest
import torch
from transformers.loss.loss_for_object_detection import generalized_box_iou
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

from pretrain.models.regions.boxes import (
    anchors,
    box_code,
    boxes_of_masks,
    centred,
    corners,
    covered,
    generalised_iou,
    inverse_sigmoid,
    map_code,
    places_in_image,
)

CPU = torch.device("cpu")


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1


def test_generalised_iou_equals_transformers():
    first, second = random_boxes(7, 0), random_boxes(5, 1)
    found = generalised_iou(first[:, None], second)
    right = generalized_box_iou(corners(first), corners(second))
    torch.testing.assert_close(found, right, atol=1e-14, rtol=0)
    torch.testing.assert_close(centred(corners(first)), first)


def test_covered_is_a_part_of_the_box_itself():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    regions = torch.tensor([[[0.55, 0.5, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    right = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    regions[0, 0, 0] = 0.65  # from 0.5 on: half of the first box
    right[0, 0, 0] = 0.5
    torch.testing.assert_close(covered(boxes, regions), right)
    assert covered(boxes, regions[:, :0]).shape == (1, 2, 0)


def test_boxes_of_masks():
    masks = torch.zeros(2, 2, 8, 10, dtype=torch.bool)
    masks[0, 0, 2:5, 3:9] = True
    masks[0, 1, 7, 0] = True
    masks[1, 0] = True
    found, some = boxes_of_masks(masks)
    assert some.tolist() == [[True, True], [True, False]]
    right = torch.tensor([[0.3, 0.25, 0.9, 0.625], [0.0, 0.875, 0.1, 1.0], [0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(corners(found[some]), right)


def test_anchors_and_padding():
    sizes = [(4, 6), (2, 3)]
    boxes, usable = anchors(sizes, CPU)
    assert boxes.shape == (30, 4) and usable.all()
    torch.testing.assert_close(boxes[7], torch.tensor([1.5 / 6, 1.5 / 4, 0.05, 0.05]))
    torch.testing.assert_close(boxes[24], torch.tensor([0.5 / 3, 0.25, 0.1, 0.1]))
    assert not anchors([(60, 3)], CPU)[1][[0, -1]].any()  # centres within 0.01 of the border
    inside = places_in_image(torch.tensor([[32, 48], [17, 23]]), (32, 48), sizes)
    assert inside[0].all()
    grid = inside[1, :24].view(4, 6)  # pixels that begin at 0, 8, 16 and 24
    assert grid.sum() == 3 * 3 and grid[:3, :3].all()
    assert inside[1, 24:].view(2, 3).tolist() == [[True, True, False]] * 2
    assert places_in_image(torch.tensor([[1, 1]]), (32, 48), sizes).sum() == len(sizes)
    assert places_in_image(torch.tensor([[16, 48]]), (32, 48), sizes).sum() == 12 + 3


def test_codes():
    boxes = random_boxes(3, 4).float()
    code = box_code(boxes, 6)
    y, x, w, h = code.unflatten(-1, (4, 6)).unbind(1)
    for part, value in ((y, boxes[:, 1]), (x, boxes[:, 0]), (w, boxes[:, 2]), (h, boxes[:, 3])):
        for k in range(3):
            angle = 2 * math.pi * value / 10_000 ** (2 * k / 6)
            torch.testing.assert_close(part[:, 2 * k], angle.sin())
            torch.testing.assert_close(part[:, 2 * k + 1], angle.cos())
    theirs = DetrSinePositionEmbedding(8, normalize=True)
    right = theirs(torch.Size([1, 3, 5, 7]), "cpu", torch.float32)
    found = map_code(5, 7, 16, CPU).T.reshape(1, 16, 5, 7)
    torch.testing.assert_close(found, right.reshape(1, 16, 5, 7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.5, 1.0])
def test_inverse_sigmoid_is_finite(value):
    x = torch.tensor([value], requires_grad=True)
    y = inverse_sigmoid(x)
    y.backward()
    assert y.isfinite() and x.grad.isfinite()
    torch.testing.assert_close(y.sigmoid(), x.clamp(1e-5, 1 - 1e-5), atol=1e-6, rtol=0)
