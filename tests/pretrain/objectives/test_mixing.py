"""Mixing on the device against loops over images and pixels, and its loss against soft targets."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.mixing import mix_pairs
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.objectives.pair_models import CLASSES, pair_batch, pair_model

MIXES = [
    (0.3, (0.0, 0.0, 0.0, 0.0)),
    (0.0, (0.2, 0.0, 0.71, 0.5)),
    (0.0, (0.0, 0.0, 0.0, 0.0)),
    (0.8, (0.0, 0.0, 0.0, 0.0)),
]


def mixed_batch() -> dict:
    batch = pair_batch(8)
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 1, -1])
    rows = [mix for mix in MIXES for _ in range(2)]
    batch["mix_share"] = torch.tensor([share for share, _ in rows])
    batch["mix_box"] = torch.tensor([box for _, box in rows])
    return batch


def by_loops(pixels: torch.Tensor, batch: dict) -> tuple[torch.Tensor, list[float]]:
    mixed, weights = pixels.clone(), []
    count, _, height, width = pixels.shape
    for row in range(count):
        other, total = row ^ 1, 0.0
        share, box = batch["mix_share"][row].item(), batch["mix_box"][row].tolist()
        labelled = batch["labels"][row] >= 0 and batch["labels"][other] >= 0
        for y in range(height):
            for x in range(width):
                inside = round(box[0] * height) <= y < round(box[2] * height) and round(
                    box[1] * width
                ) <= x < round(box[3] * width)
                part = (1.0 if inside else share) if labelled else 0.0
                total += part
                mixed[row, :, y, x] = (1 - part) * pixels[row, :, y, x] + part * pixels[
                    other, :, y, x
                ]
        weights.append(total / (height * width))
    return mixed, weights


def test_pixels_and_weights():
    batch = mixed_batch()
    pixels = torch.randn(8, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    expected, weights = by_loops(pixels, batch)
    mixed, found = mix_pairs(pixels, batch)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(found, torch.tensor(weights))
    assert found[0] == pytest.approx(0.3) and found[2] == pytest.approx(3 * 5 / 60)
    assert found[4:].tolist() == [0, 0, 0, 0]  # left alone, and one of the pair has no label
    assert torch.equal(mix_pairs(pixels.bfloat16(), batch)[0][4:], pixels.bfloat16()[4:])


@pytest.mark.parametrize("form", ["labels", "probabilities"])
def test_loss_is_that_of_soft_targets(form):
    model, batch = pair_model(), mixed_batch()
    own = F.one_hot(batch["labels"].clamp(min=0), CLASSES).float()
    if form == "probabilities":
        noise = torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(3))
        own = 0.7 * own + 0.3 * noise.softmax(1)
        batch["targets"] = own * (batch["labels"] >= 0)[:, None]
    objective = model.objectives["classify"]
    totals = objective.counts(batch)
    pixels = batch["images"] / 255 - torch.tensor(MEAN).view(3, 1, 1)
    mixed, weights = by_loops(pixels / torch.tensor(STD).view(3, 1, 1), batch)
    logits = objective.head(model.encoders["image"](mixed).mean(1))
    swapped = own.view(4, 2, CLASSES).flip(1).view(8, CLASSES)
    weight = torch.tensor(weights)[:, None]
    smoothing = objective.label_smoothing
    targets = (1 - weight) * own + weight * swapped
    targets = (1 - smoothing) * targets + smoothing / CLASSES
    losses = F.cross_entropy(logits, targets, reduction="none")
    out = model("classify", "undivided", batch, totals)
    torch.testing.assert_close(out["loss"], losses[:7].sum() / 7, rtol=1e-5, atol=1e-6)
    best = torch.where(weight[:, 0] > 0.5, swapped.argmax(1), own.argmax(1))
    hits = (logits.argmax(1) == best)[:7].float().mean()
    torch.testing.assert_close(out["top1"], hits)
    larger = torch.where(weight > 0.5, swapped, own)
    entropies = F.cross_entropy(logits, larger, reduction="none")
    torch.testing.assert_close(out["cross_entropy"], entropies[:7].mean())
