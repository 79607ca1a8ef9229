"""Several sizes in one step: shapes, the consistency loss against its formula, and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.resolutions import resized, scale_consistency, scaled_shapes
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.models.internimage.internimage_models import small_encoder
from tests.pretrain.objectives.pair_models import CLASSES, pair_batch, pair_model


def test_sizes():
    assert scaled_shapes(224, 224, [160, 128]) == [(224, 224), (160, 160), (128, 128)]
    assert scaled_shapes(128, 256, [160, 64]) == [(128, 256), (128, 256), (64, 128)]
    pixels = torch.rand(2, 3, 32, 48)
    copy = resized(pixels, (16, 24))
    assert copy.shape == (2, 3, 16, 24)
    torch.testing.assert_close(copy.mean(), pixels.mean(), atol=0.02, rtol=0)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = pixels.to(dtype)
        assert torch.equal(resized(rounded, (16, 24)), resized(rounded.float(), (16, 24)).to(dtype))


def test_consistency_is_its_formula_and_teaches_downwards_only():
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(4, 6, generator=generator).requires_grad_() for _ in range(2))
    counted = torch.tensor([True, True, False, True])
    expected = 0.0
    for row in (0, 1, 3):
        teacher = large[row].detach()
        teacher = (teacher - teacher.mean()) / (teacher.var(unbiased=False) + 1e-5).sqrt()
        gap = (small[row] - teacher).abs()
        expected += torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
    found = scale_consistency(small, large, counted)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert large.grad is None and small.grad[0].any() and not small.grad[2].any()


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    pixels = images / 255 - torch.tensor(MEAN).view(3, 1, 1)
    return pixels / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("own_views", [False, True])
def test_loss_is_the_mean_over_sizes(own_views):
    """A chain: each size but the first learns from the next larger one."""
    model, batch = pair_model(), pair_batch(6)
    batch["labels"][2] = -1  # pulls nothing
    objective = model.objectives["classify"]
    totals = objective.counts(batch)
    whole = model("classify", "undivided", batch, totals)
    objective.consistency = 0.7
    pixels = [pixels_of(batch["images"])]
    if own_views:
        objective.smaller_views = (12, 8)
        views = {
            f"images_{side}": pair_batch(6, seed=side)["images"][..., :side, :side]
            for side in (12, 8)
        }
        batch = batch | views
        pixels += map(pixels_of, views.values())
    else:
        objective.smaller_sizes = (12, 8)
        pixels += [
            F.interpolate(pixels[0], (side, side), mode="bicubic", antialias=True)
            for side in (12, 8)
        ]
    out = model("classify", "undivided", batch, totals)
    vectors = [model.encoders["image"](p).mean(1) for p in pixels]
    counted = batch["labels"] >= 0
    losses = [
        F.cross_entropy(objective.head(own)[counted], batch["labels"][counted], label_smoothing=0.1)
        for own in vectors
    ]
    torch.testing.assert_close(losses[0], whole["loss"])
    pulls = [
        scale_consistency(small, large, counted) / counted.sum()
        for large, small in itertools.pairwise(vectors)
    ]
    torch.testing.assert_close(out["loss"], (sum(losses) + 0.7 * sum(pulls)) / 3)
    assert out["top1"] == whole["top1"] and out["cross_entropy"] == whole["cross_entropy"]
    assert out.keys() == whole.keys()
    flops = [
        objective.encoder_flops(*p.shape[2:]) + 3 * 2 * objective.head.weight.numel()
        for p in pixels
    ]
    assert objective.flops(batch) == 6 * sum(flops)


def passes_model(own_views: bool, consistency: float):
    """A classifier on an InternImage in training, with drop path and batch norm; and a batch of
    mixed images with soft targets."""
    encoder = small_encoder(head={"type": "conv"}, drop_path=0.4)
    sizes = (48, 32)
    objective = ClassificationSettings(
        pool="head", smaller_sizes=() if own_views else sizes, scale_consistency=consistency
    ).build(
        BuildContext(
            {"image": encoder},
            None,
            MEAN,
            STD,
            classes=CLASSES,
            smaller_views=sizes if own_views else (),
        )
    )
    model = MultiTaskModel({"image": encoder}, {"classify": objective}, seed=3)
    initialise(objective, 0)
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(6, CLASSES, generator=generator)
    targets /= targets.sum(1, keepdim=True)
    targets[4] = 0
    labels = targets.argmax(1)
    labels[4] = -1
    batch = {
        "labels": labels,
        "targets": targets,
        "valid": torch.ones(6, dtype=torch.bool),
        "position": torch.arange(6),
        "mix_share": torch.tensor([0.3, 0.3, 0, 0, 0.5, 0.5]),
        "mix_box": torch.tensor([[0.0] * 4] * 2 + [[0.1, 0.2, 0.6, 0.9]] * 2 + [[0.0] * 4] * 2),
    }
    names = {"images": 64, "images_48": 48, "images_32": 32}
    batch |= {
        name: torch.randint(0, 256, (6, 3, side, side), generator=generator, dtype=torch.uint8)
        for name, side in names.items()
        if own_views or name == "images"
    }
    return model.train(), batch


@pytest.mark.parametrize("own_views", [False, True])
@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_passes_add_up_to_one_graph(own_views, consistency):
    """A backward pass for each size: gradients to 1e-6 and the same statistics, bit for bit."""
    found = []
    for separate in (False, True):
        model, batch = passes_model(own_views, consistency)
        totals = {"images": 9, "labels": 8}
        if separate:
            count, carried, out = model.objectives["classify"].passes(batch), None, {}
            assert count == 3
            for number in range(count):
                shares = model("classify", "losses_in_pass", batch, totals, {}, number, carried)
                carried = shares.pop("carried", None)
                assert carried is None or not carried.requires_grad
                assert (carried is None) == (number == 2 or not consistency)
                shares["loss"].backward()
                out |= {name: out.get(name, 0) + value.detach() for name, value in shares.items()}
        else:
            out = model("classify", "undivided", batch, totals)
            out["loss"].backward()
        found.append(
            (out, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers()))
        )
    (joint, gradients, buffers), (out, own, statistics) = found
    assert out.keys() == joint.keys()
    for name, value in joint.items():
        torch.testing.assert_close(out[name], value.detach(), atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name],
            gradient,
            atol=1e-6 * max(1.0, gradient.abs().max().item()),
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert all(torch.equal(statistics[name], buffer) for name, buffer in buffers.items())


def test_settings():
    for sizes in ([128, 160], [160, 160], [0]):
        with pytest.raises(ValidationError, match="must descend"):
            ClassificationSettings(smaller_sizes=sizes)
    settings, encoders = ClassificationSettings(smaller_sizes=[8]), pair_model().encoders
    built = settings.build(BuildContext(encoders, None, MEAN, STD, classes=CLASSES))
    assert built.smaller_sizes == (8,)
    with pytest.raises(ValueError, match="two ways to the same"):
        settings.build(BuildContext(encoders, None, MEAN, STD, classes=CLASSES, smaller_views=(8,)))
