"""Several sizes in one step: shapes, the consistency loss against its formula, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.resolutions import at_sizes, scale_consistency, scaled_shapes
from tests.pretrain.models.git_models import MEAN, STD
from tests.pretrain.objectives.pair_models import CLASSES, pair_batch, pair_model


def test_sizes():
    assert scaled_shapes(224, 224, [160, 128]) == [(224, 224), (160, 160), (128, 128)]
    assert scaled_shapes(128, 256, [160, 64]) == [(128, 256), (64, 128)]
    pixels = torch.rand(2, 3, 32, 48)
    copies = at_sizes(pixels, [16])
    assert copies[0] is pixels and copies[1].shape == (2, 3, 16, 24)
    torch.testing.assert_close(copies[1].mean(), pixels.mean(), atol=0.02, rtol=0)


def test_consistency_is_its_formula_and_teaches_downwards_only():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(4, 6, generator=generator).requires_grad_() for _ in range(3)]
    counted = torch.tensor([True, True, False, True])
    expected = 0.0
    for large, small in ((0, 1), (1, 2)):
        for row in (0, 1, 3):
            teacher = vectors[large][row].detach()
            teacher = (teacher - teacher.mean()) / (teacher.var(unbiased=False) + 1e-5).sqrt()
            gap = (vectors[small][row] - teacher).abs()
            expected += torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
    found = scale_consistency(vectors, counted)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert vectors[0].grad is None and vectors[1].grad[0].any() and not vectors[2].grad[2].any()


def test_loss_is_the_mean_over_sizes():
    model, batch = pair_model(), pair_batch(6)
    objective = model.objectives["classify"]
    totals = objective.count(batch)
    whole = model("classify", batch, totals)
    objective.smaller_sizes, objective.consistency = (8,), 0.7
    out = model("classify", batch, totals)
    pixels = (batch["images"] / 255 - torch.tensor(MEAN).view(3, 1, 1))
    pixels = pixels / torch.tensor(STD).view(3, 1, 1)
    small = F.interpolate(pixels, (8, 8), mode="bicubic", antialias=True)
    vectors = [model.encoders["image"](p).mean(1) for p in (pixels, small)]
    counted = batch["labels"] >= 0
    loss = F.cross_entropy(
        objective.head(vectors[1])[counted], batch["labels"][counted], label_smoothing=0.1
    )
    pull = scale_consistency(vectors, counted) / counted.sum()
    torch.testing.assert_close(out["loss"], (whole["loss"] + loss + 0.7 * pull) / 2)
    assert out["top1"] == whole["top1"] and out["cross_entropy"] == whole["cross_entropy"]
    assert objective.flops(batch) > 0


def test_settings():
    for sizes in ([128, 160], [160, 160], [0]):
        with pytest.raises(ValidationError, match="must descend"):
            ClassificationSettings(smaller_sizes=sizes)
    built = ClassificationSettings(smaller_sizes=[8]).build(
        pair_model().encoders, None, MEAN, STD, classes=CLASSES
    )
    assert built.smaller_sizes == (8,)
