"""M3I: one image after the other as the oracle, and what each part may and may not see.

Several ranks and micro-batches: tests/distributed/test_m3i.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.m3i.loss import KINDS
from pretrain.objectives.m3i.pair_masks import pair_masks
from pretrain.objectives.m3i.settings import M3ISettings
from pretrain.objectives.m3i.view_positions import grid_code, relative_positions, target_code
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.objectives.m3i.m3i_models import (
    features_of,
    follow,
    half_cosine,
    m3i_batch,
    m3i_model,
    m3i_rows,
)
from tests.pretrain.objectives.pair_models import gradients

TOTALS = ("images", "intra", "inter", "texts", "labels")


def run(model, batch, totals=None):
    """Metrics of a batch that is the whole global batch."""
    return model("m3i", "undivided", batch, totals or model.objectives["m3i"].counts(batch))


def pixels_of(images):
    shape = (3, 1, 1)
    return (images / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def plain(model, batch, draws):
    """Losses and metrics with every image by itself: no gathered tokens, no masks over padded
    ones."""
    objective, encoder = model.objectives["m3i"], model.encoders["image"]
    settings, size = objective.settings, batch["images"].shape[-2:]
    cells = [side // settings.cell for side in size]
    masks = pair_masks(draws, tuple(cells))
    grid, vectors, squares, targets = encoder.grid("cells").sides(*size), [], [[], []], [[], []]

    def finer(mask, sides):
        return mask.repeat_interleave(sides[0] // cells[0], 0).repeat_interleave(
            sides[1] // cells[1], 1
        )

    pixels, others = pixels_of(batch["images"]), pixels_of(batch["second_images"])
    predictions, count = [[], []], grid[0] * grid[1]
    for row in range(len(pixels)):
        pair, second = row // 2, row % 2
        mixed = torch.where(finer(masks[pair], size), pixels[2 * pair], pixels[2 * pair + 1])
        own = finer(masks[pair], encoder.grid("stem").sides(*size))
        sign = torch.where(own, 1.0, -1.0)[..., None]
        joined = (sign * objective.mark.mark)[None]
        tokens = encoder.encode(mixed[None], ("cells",), joined=joined).cells[0]
        own = finer(masks[pair], grid).flatten() ^ bool(second)
        seen = tokens[own][None]
        vectors.append(pooled(objective, encoder, seen))
        view = (others if second else pixels)[row]
        dense = objective.target.encoder.encode(view[None], ("cells",)).cells
        target = objective.target.projector(dense)
        targets[second].append(target[0].detach())
        crops = batch["crops"][row, [0, second]][None]
        positions, scales = relative_positions(crops, batch["flips"][row, [0, second]][None], grid)
        asked = objective.predictor.positions(target_code(positions, scales, 32))
        code = grid_code(grid, 32, asked.device)[own]
        joined = torch.cat(
            [objective.projector(seen) + code, objective.predictor.mask_token + asked], 1
        )
        for block in objective.predictor.blocks:
            joined = block(joined)
        prediction = objective.predictor.output(joined[0, -count:])
        counted = slice(None) if second else ~own
        predictions[second].append((prediction[counted], counted))
    middle = torch.cat(targets[0] + targets[1]).mean(0) if settings.center_targets else 0.0
    normed = [[F.layer_norm(own - middle, (32,)) for own in kind] for kind in targets]
    for kind in range(2):
        every = torch.cat(normed[kind])
        correlation = every.T @ every / len(every)
        for (prediction, counted), target in zip(predictions[kind], normed[kind], strict=True):
            target = target[counted]
            distance = (prediction - target).square().sum(1)
            similar = torch.einsum("nc,cd,nd->n", prediction, correlation, prediction)
            squares[kind].append((distance + settings.decorrelation * similar) / 32)
    losses = {k: torch.cat(s).mean() for k, s in zip(KINDS[:2], squares, strict=True)}
    vectors = torch.stack(vectors)
    has = batch["loss_mask"][:, 0].any(1)
    image = F.normalize(vectors[has], dim=1)
    tokens = batch["tokens"][has, 0]
    ends = (tokens == 2).int().argmax(1)
    text = torch.cat(
        [
            model.encoders["text"](row[None, : end + 1])
            for row, end in zip(tokens, ends, strict=True)
        ]
    )
    text = F.normalize(text @ objective.text_projection.weight.T, dim=1)
    logits = image @ text.T * objective.temperature.log_scale.exp()
    labels = batch["labels"]
    names = [tuple(t.tolist()) for t in tokens]
    classes = batch["prompt_class"][has]
    target = torch.tensor(
        [
            [float(a == b or la == lb != -1) for b, lb in zip(names, classes, strict=True)]
            for a, la in zip(names, classes, strict=True)
        ]
    )
    places, target = target.bool(), target / target.sum(1, keepdim=True)
    losses["text"] = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    norm = encoder.fc_norm if hasattr(encoder, "fc_norm") else objective.pool.norm
    scores, known = objective.head(norm(vectors))[labels >= 0], labels[labels >= 0]
    losses["category"] = F.cross_entropy(scores, known, label_smoothing=settings.label_smoothing)
    row = torch.arange(len(logits))
    metrics = {
        "image_to_text": places[row, logits.argmax(1)].float().mean(),
        "text_to_image": places[row, logits.argmax(0)].float().mean(),
        "top1": (scores.argmax(1) == known).float().mean(),
        "target_std": torch.cat(normed[0] + normed[1]).std(0, correction=0).mean(),
        "effective_rank": rank_of(torch.cat(normed[0] + normed[1])),
    }
    return losses, metrics, target


def rank_of(rows):
    """exp of the entropy of the singular values of centred rows (n, C), as shares of their sum."""
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    shares = (values / values.sum()).clamp(min=1e-12)
    return torch.exp(-(shares * shares.log()).sum()).float()


def pooled(objective, encoder, seen):
    """The vector (D,) of an image from its own tokens (1, n, width)."""
    if hasattr(encoder, "clip_projector"):
        return encoder.clip_projector(seen)[0]
    return objective.pool.reduce(F.gelu(objective.pool.expand(seen[0].mean(0))))


@pytest.mark.parametrize(
    "kind, size, changes",
    [
        ("vit", (16, 16), {}),
        ("vit", (16, 16), {"center_targets": False}),
        ("vit", (12, 20), {"decorrelation": 0.3, "label_smoothing": 0.2}),  # 15 cells, so 8 and 7
        ("internimage", (32, 96), {}),
    ],
)
def test_forward_is_the_plain_formula(kind, size, changes):
    model, batch = m3i_model(kind, **changes), m3i_batch(12, size=size)
    follow(model, 0.5)
    wanted, metrics, target = plain(model, batch, SampleDraws(3, "m3i", batch["position"]))
    assert (target > 0).sum() > len(target) + 4, "some texts must match several images"
    assert model.objectives["m3i"].counts(batch) == {
        "images": 12,
        "intra": 6,
        "inter": 6,
        "texts": 9,
        "labels": int((batch["labels"] >= 0).sum()),
    }
    out = run(model, batch)
    assert [name for name, value in out.items() if value.requires_grad] == ["loss"]
    for name in KINDS:
        torch.testing.assert_close(out[name], wanted[name].detach(), rtol=2e-5, atol=1e-6)
    for name, value in metrics.items():
        # Roots of eigenvalues near 0 are rounding enlarged.
        tolerance = 1e-3 if name == "effective_rank" else 1e-4
        torch.testing.assert_close(out[name], value, rtol=tolerance, atol=1e-6, msg=name)
    torch.testing.assert_close(out["loss"], sum(wanted.values()))
    out["loss"].backward()
    found = gradients(model)
    model.zero_grad()
    sum(wanted.values()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert out["with_text"] == 0.75 and 0 < out["labelled"] < 1
    assert out["temperature"].item() == pytest.approx(0.2)
    with torch.no_grad():
        assert "effective_rank" not in run(model.eval(), batch)


@pytest.mark.parametrize("kind, size", [("vit", (16, 16)), ("internimage", (32, 96))])
def test_everything_but_the_target_branch_learns(kind, size):
    model, batch = m3i_model(kind), m3i_batch(8, size=size)
    run(model, batch)["loss"].backward()
    found = gradients(model)
    target = "objectives.m3i.target."
    assert not any(name.startswith(target) for name in found)
    # A softmax does not see biases of keys; DCNv3 begins with offsets that read nothing.
    still = ("k_bias", ".dcn.dw_conv.")
    for name, parameter in model.named_parameters():
        if name.startswith(target):
            assert not parameter.requires_grad
        elif not any(part in name for part in still):
            assert found[name].abs().max() > 0, name
    assert not model.objectives["m3i"].train().target.training


def test_targets_come_from_the_target_branch():
    """Whatever its weights are, and not from the trained one."""
    model, batch = m3i_model(), m3i_batch(4)
    before = run(model, batch)["intra"]
    with torch.no_grad():
        model.objectives["m3i"].target.projector.linear.weight.mul_(-1)
    assert abs(run(model, batch)["intra"] - before) > 1e-3


@pytest.mark.parametrize("group", [False, True])
def test_group_attention_keeps_images_apart(group, monkeypatch):
    model, batch = m3i_model(group_attention=group), m3i_batch(4)
    objective = model.objectives["m3i"]
    pixels = pixels_of(batch["images"]).requires_grad_()
    monkeypatch.setattr(type(objective), "_pixels", lambda *_: pixels)
    features, _ = objective.encode(model.encoders, batch, SampleDraws(3, "m3i", batch["position"]))
    for own in range(4):
        asked = sum(features[n][own].square().sum() for n in ("prediction", "image", "logits"))
        asked = asked + features["prediction"][own].sum() + features["logits"][own].sum()
        (found,) = torch.autograd.grad(asked, pixels, retain_graph=True)
        partner = own ^ 1
        assert found[own].abs().max() > 1e-4
        assert (found[partner].abs().max() > 1e-6) != group
        assert not found[[n for n in range(4) if n not in (own, partner)]].any()
        shown = (found[own].abs().sum(0) > 0).float().mean()
        assert shown == 0.5, "half of the image is hidden"


def test_the_order_of_pairs_does_not_matter():
    model, batch = m3i_model(), m3i_batch(8)
    order = torch.tensor([4, 5, 0, 1, 6, 7, 2, 3])
    other = {name: value[order] for name, value in batch.items()}
    one, two = run(model, batch), run(model, other)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_nothing_but_images():
    """No text, no label: both losses are 0, their heads have a gradient, which is 0."""
    model, batch = m3i_model(), m3i_batch(6)
    batch["loss_mask"][:] = False
    batch["labels"][:] = -1
    out = run(model, batch)
    assert out["text"] == out["category"] == out["with_text"] == out["labelled"] == 0
    torch.testing.assert_close(out["loss"], out["intra"] + out["inter"])
    out["loss"].backward()
    found = gradients(model)
    for name in ("text_projection.weight", "temperature.log_scale", "head.weight"):
        assert not found[f"objectives.m3i.{name}"].any()
    assert not found["encoders.text.blocks.0.mlp.expand.weight"].any()
    assert found["encoders.image.embedding.patches.weight"].abs().max() > 0
    assert all(torch.isfinite(g).all() for g in found.values())


def test_a_class_makes_a_match_between_prompts_alone():
    """A batch of captions has the text loss that it has without labels; one of prompts that of
    UniCL, where all of a class match (as `always` has it of any batch)."""
    batch = m3i_batch(12)
    batch["labels"] = torch.arange(12) // 4
    captions = batch | {"prompt_class": torch.full((12,), -1)}
    prompts = batch | {"prompt_class": batch["labels"] + 1000}  # numbers of their own
    no_labels = captions | {"labels": torch.full((12,), -1)}
    text = {
        (mode, name): run(m3i_model(labels_match=mode), rows)["text"].item()
        for mode in ("prompts", "always", "never")
        for name, rows in (("captions", captions), ("prompts", prompts), ("no labels", no_labels))
    }
    plain_loss = text["never", "captions"]
    assert text["prompts", "captions"] == text["prompts", "no labels"] == plain_loss
    assert text["never", "prompts"] == text["always", "no labels"] == plain_loss
    unicl = plain(m3i_model(), prompts, SampleDraws(3, "m3i", batch["position"]))[0]["text"].item()
    assert text["prompts", "prompts"] == pytest.approx(unicl, rel=2e-5)
    assert text["always", "captions"] == text["always", "prompts"] == text["prompts", "prompts"]
    assert unicl > plain_loss + 0.01


def test_without_texts_and_classes():
    model, batch = m3i_model(texts=False, classes=None), m3i_batch(6)
    out = run(model, batch)
    assert set(out) == {"loss", "intra", "inter", "target_std", "effective_rank"}
    assert not any("text" in n or "head" in n for n, _ in model.named_parameters())


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="5 images cannot be mixed in pairs"):
        run(m3i_model(), m3i_batch(5))


def test_padding_rows_of_the_loader_change_nothing():
    model, batch = m3i_model(), m3i_batch(6)
    out = run(model, batch)
    out["loss"].backward()
    wanted = gradients(model)
    model.zero_grad()
    padded = m3i_rows(batch, [0, 1, -1, -1, 2, 3, 4, 5])
    assert model.objectives["m3i"].counts(padded) == model.objectives["m3i"].counts(batch)
    again = run(model, padded)
    again["loss"].backward()
    for name in out:
        if name != "effective_rank":  # of the step before; see CollapseWatch
            torch.testing.assert_close(again[name], out[name], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


def test_an_image_whose_partner_could_not_be_read():
    """As held out: it counts, and the partner in nothing."""
    model, batch = m3i_model(), m3i_batch(6)
    part = m3i_rows(batch, [0, 1, 2, 3, 4, -1])
    counts = model.objectives["m3i"].counts(part)
    assert [counts[name] for name in ("images", "intra", "inter")] == [5, 3, 2]
    features, _ = features_of(model, part, SampleDraws(3, "m3i", part["position"]))
    tokens = features["target"][:5]
    normed = F.layer_norm(tokens - tokens.mean((0, 1)), (32,)).flatten(0, 1)
    wanted = normed.std(0, correction=0).mean()
    torch.testing.assert_close(run(model, part)["target_std"], wanted)


def test_flops_are_those_of_all_matrix_products():
    """Counted by torch in a forward pass, where the mean of a text is one, too; what is trained has
    twice as many backwards."""
    model, batch = m3i_model(), m3i_batch(8)
    objective = model.objectives["m3i"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model("m3i", "features", batch)
        model("m3i", "targets", batch)
    counts = counter.get_flop_counts()
    target = sum(counts["MultiTaskModel.objectives.m3i.target"].values())
    trained = counter.get_total_flops() - target
    assert target > 0 and objective.flops(batch) == pytest.approx(3 * trained + target, rel=2e-4)
    assert objective.flops(m3i_rows(batch, [0, 1, -1, -1])) == objective.flops(batch) / 4


def test_the_temperature_is_held():
    model, batch = m3i_model(max_scale=6.0), m3i_batch(4)
    with torch.no_grad():
        model.objectives["m3i"].temperature.log_scale.fill_(9.0)
    assert run(model, batch)["temperature"].item() == pytest.approx(1 / 6)


def test_weights_of_losses():
    model = m3i_model(weights={"intra": 0.5, "inter": 0.0, "text": 3.0, "category": 2.0})
    out = run(model, m3i_batch(6))
    wanted = 0.5 * out["intra"] + 3 * out["text"] + 2 * out["category"]
    torch.testing.assert_close(out["loss"].detach(), wanted)


def test_the_target_follows_in_closed_form():
    """After n steps the target is the sum of the online weights with the weights of the rule."""
    model, steps = m3i_model(), 5
    name = "projector.linear.weight"
    online = model.get_parameter(f"objectives.m3i.{name}")
    target = model.get_parameter(f"objectives.m3i.target.{name}")
    assert torch.equal(online, target)
    wanted, left = torch.zeros_like(online), 1.0
    history = [online.detach().clone()]
    for step in range(steps):
        with torch.no_grad():
            online.add_(0.1 * (step + 1))
        history.append(online.detach().clone())
        follow(model, half_cosine(step, steps, 0.5, 1.0))
    for step in reversed(range(steps)):
        momentum = half_cosine(step, steps, 0.5, 1.0)
        wanted += left * (1 - momentum) * history[step + 1]
        left *= momentum
    torch.testing.assert_close(target, wanted + left * history[0])
    targets = model.objectives["m3i"].momentum_targets
    assert targets.momentum_at(2, 5) == pytest.approx(half_cosine(2, 5, 0.995, 1.0))


@pytest.mark.parametrize(
    "kind, size, cells",
    [
        ("internimage", (64, 64), 4),
        ("internimage", (32, 96), 3),
        ("vit", (20, 12), 15),
    ],
)
def test_grids_of_even_and_odd_cells(kind, size, cells):
    model, batch = m3i_model(kind), m3i_batch(4, size=size)
    features, dense = features_of(model, batch, SampleDraws(3, "m3i", batch["position"]))
    tokens = cells * (4 if kind == "internimage" else 1)
    assert features["prediction"].shape == features["target"].shape == (4, tokens, 32)
    assert dense.shape[:2] == (2, tokens)
    assert features["counted"][1::2].all()
    hidden = cells // 2 * (4 if kind == "internimage" else 1)
    assert (features["counted"][::2].sum(1) == hidden).all()


def test_an_internimage_hands_on_its_projector():
    """Whole images: what `pool: head` of a later stage reads is what classes were learned from."""
    model, batch = m3i_model("internimage").eval(), m3i_batch(4, size=(64, 64))
    objective, encoder = model.objectives["m3i"], model.encoders["image"]
    vectors = objective.image_vectors(model.encoders, batch["images"])
    pooled = encoder.encode(pixels_of(batch["images"]), ("pooled",)).pooled
    torch.testing.assert_close(encoder.fc_norm(vectors), pooled)
    torch.testing.assert_close(
        objective.class_logits(model.encoders, vectors), objective.head(pooled)
    )


def test_a_flat_batch_of_equal_targets_is_no_number_free():
    """A collapsed target branch: rank near 1, losses finite."""
    model, batch = m3i_model(), m3i_batch(8)
    with torch.no_grad():
        model.objectives["m3i"].target.projector.linear.weight.zero_()
        model.objectives["m3i"].target.projector.linear.bias.copy_(torch.arange(32.0))
        for parameter in model.objectives["m3i"].target.projector.blocks.parameters():
            parameter.zero_()
    out = run(model, batch)
    assert out["target_std"] < 1e-3 and math.isfinite(out["loss"].item())


def test_a_loss_that_is_not_finite_is_returned():
    """So that the loop skips the step."""
    model, batch = m3i_model(balance={}), m3i_batch(8)
    before = {n: b.clone() for n, b in model.named_buffers() if "steps" not in n}
    with torch.no_grad():
        model.objectives["m3i"].target.projector.linear.bias[0] = torch.nan
    assert run(model, batch)["loss"].isnan()
    for name in ("rank", "norm_bits"):
        (own,) = (n for n in before if n.endswith(name))
        assert model.get_buffer(own).isfinite().all()


def test_impossible_settings():
    with pytest.raises(ValidationError, match="intra and inter are both 0"):
        M3ISettings(weights={"intra": 0, "inter": 0})
    with pytest.raises(ValidationError, match=r"below 1 / max_scale"):
        M3ISettings(temperature=0.001)
    with pytest.raises(ValueError, match="an InternImage has its own"):
        m3i_model("internimage", pooled_width=8)
    with pytest.raises(ValueError, match=r"balance measures.*raise micro_batch"):
        model = m3i_model(balance={})
        model("m3i", "features", m3i_batch(4))
