"""The contrastive objective: plain formulas and transformers' CLIP as oracles, padding, retrieval.

Gradients over several ranks and micro-batches: tests/distributed/test_coupled.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pretrain.models.build_context import BuildContext
from pretrain.objectives.contrastive.contrastive import ContrastiveSettings, Temperature
from pretrain.objectives.contrastive.loss import caption_ids, contrastive_sums
from pretrain.objectives.objective import EvaluationContext
from pretrain.objectives.retrieval import retrieval_recalls
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.objectives.pair_models import (
    gradients,
    pair_batch,
    pair_model,
    rows_of,
)


def unit(rows: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1).requires_grad_()


def sums(image, text, scale, ids, valid=None, identical=True):
    valid = torch.ones(len(image), dtype=torch.bool) if valid is None else valid
    return contrastive_sums(image, text, scale, torch.tensor(ids), valid, identical)


def test_distinct_captions_equal_transformers_clip():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text, scale = unit(5, 0), unit(5, 1), torch.tensor([9.0], requires_grad=True)
    expected = image_text_contrastive_loss(scale * text @ image.T)
    wanted = torch.autograd.grad(expected, [image, text, scale])
    for identical in (True, False):
        loss, *_ = sums(image, text, scale, [3, 1, 4, 15, 9], identical=identical)
        torch.testing.assert_close(loss / 5, expected)
        found = torch.autograd.grad(loss / 5, [image, text, scale])
        torch.testing.assert_close(found, wanted)


def test_identical_captions_share_the_target():
    image, text, scale = unit(4, 0), unit(4, 1), torch.tensor([9.0])
    text = text[[0, 1, 0, 3]]  # identical captions have identical features
    loss, image_hits, text_hits = sums(image, text, scale, [7, 8, 7, 9])
    target = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    logits = scale * image @ text.T
    expected = (
        F.cross_entropy(logits, target, reduction="sum")
        + F.cross_entropy(logits.T, target, reduction="sum")
    ) / 2
    torch.testing.assert_close(loss, expected)
    assert image_hits == (target[range(4), logits.argmax(1)] > 0).sum()
    assert text_hits == (target[range(4), logits.argmax(0)] > 0).sum()
    strict, *_ = sums(image, text, scale, [7, 8, 7, 9], identical=False)
    own = (
        F.cross_entropy(logits, torch.arange(4), reduction="sum")
        + F.cross_entropy(logits.T, torch.arange(4), reduction="sum")
    ) / 2
    torch.testing.assert_close(strict, own)


@pytest.mark.parametrize("identical", [True, False])
def test_padding_rows_neither_count_nor_stand_against(identical):
    image, text, scale = unit(5, 0), unit(5, 1), torch.tensor([20.0], requires_grad=True)
    keep = torch.tensor([True, False, True, True, False])
    ids = [1, 1, 2, 1, 5]  # a padding row may even carry a caption of the batch
    part = [x.detach()[keep].requires_grad_() for x in (image, text)]
    expected = sums(*part, scale, [1, 2, 1], identical=identical)
    found = sums(image, text, scale, ids, keep, identical)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    wanted = torch.autograd.grad(expected[0], [*part, scale])
    grads = torch.autograd.grad(found[0], [image, text, scale])
    torch.testing.assert_close(grads[2], wanted[2])
    for one, other in zip(grads[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one[keep], other)
        assert not one[~keep].any()


def test_a_rank_of_padding_alone_has_a_finite_zero():
    image, text, scale = unit(2, 0), unit(2, 1), torch.tensor([20.0], requires_grad=True)
    loss, *hits = sums(image, text, scale, [1, 1], torch.zeros(2, dtype=torch.bool))
    found = torch.autograd.grad(loss, [image, text, scale])
    assert loss == 0 and hits == [0, 0]
    assert all(torch.isfinite(g).all() and not g.any() for g in found)


def test_caption_ids_see_the_text_and_nothing_else():
    tokens = torch.tensor(
        [
            [1, 5, 6, 2, 0, 0],
            [1, 5, 6, 2, 7, 7],
            [1, 6, 5, 2, 0, 0],
            [1, 5, 2, 0, 0, 0],
            [1, 0, 2, 0, 0, 0],
        ]
    )
    mask = torch.tensor(
        [
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
        ]
    ).bool()
    ids = caption_ids(tokens, mask)
    assert ids[0] == ids[1] and len(set(ids.tolist())) == 4
    assert caption_ids(F.pad(tokens, (0, 8)), F.pad(mask, (0, 8))).tolist() == ids.tolist()
    many = torch.randint(0, 50_000, (20_000, 12), generator=torch.Generator().manual_seed(0))
    assert len(caption_ids(many, torch.ones_like(many).bool()).unique()) == len(many)


def test_forward_is_the_plain_formula():
    """From pixels and tokens: projections, unit length, temperature, both directions."""
    model, batch = pair_model(), pair_batch(7, seed=1)
    objective, encoders = model.objectives["contrast"], model.encoders
    assert objective.counts(batch) == {"pairs": 7}
    out = model("contrast", "undivided", batch, {"pairs": 7})
    pixels = batch["images"] / 255 - torch.tensor(MEAN).view(3, 1, 1)
    tokens = encoders["image"](pixels / torch.tensor(STD).view(3, 1, 1))
    image = F.normalize(tokens.mean(1) @ objective.image_projection.weight.T, dim=1)
    text = encoders["text"](batch["tokens"][:, 0])
    text = F.normalize(text @ objective.text_projection.weight.T, dim=1)
    logits = image @ text.T * objective.temperature.log_scale.exp()
    captions = [tuple(row) for row in batch["tokens"][:, 0].tolist()]
    same = torch.tensor([[a == b for b in captions] for a in captions])
    classes = batch["prompt_class"]
    of_class = (classes[:, None] == classes) & (classes >= 0)
    assert (of_class & ~same).any()

    def loss(matches):
        target = matches.float() / matches.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    torch.testing.assert_close(out["loss"], loss(same | of_class))
    for changes, matches in (
        ({"labels_match": "never"}, same),
        ({"identical_captions_match": False}, torch.eye(7).bool()),
        (
            {"identical_captions_match": False, "labels_match": "prompts"},
            torch.eye(7).bool() | of_class,
        ),
    ):
        found = pair_model(**changes)("contrast", "undivided", batch, {"pairs": 7})["loss"]
        torch.testing.assert_close(found, loss(matches))
    assert out["temperature"].item() == pytest.approx(0.2)
    hits = (same | of_class)[range(7), logits.argmax(1)].float().mean()
    torch.testing.assert_close(out["image_to_text"], hits)
    out["loss"].backward()
    found = gradients(model)
    assert {n for n, _ in model.named_parameters()} - set(found) == {
        "objectives.classify.head.weight",
        "objectives.classify.head.bias",
    }
    assert found["objectives.contrast.temperature.log_scale"].abs() > 1e-4


def test_padding_rows_of_the_loader_change_nothing():
    model, batch = pair_model(), pair_batch(6)
    plain = model("contrast", "undivided", batch, {"pairs": 6})
    plain["loss"].backward()
    wanted = gradients(model)
    model.zero_grad()
    padded = rows_of(batch, [0, 1, -1, 2, 3, 4, 5, -1])
    assert model.objectives["contrast"].counts(padded) == {"pairs": 6}
    out = model("contrast", "undivided", padded, {"pairs": 6})
    out["loss"].backward()
    for name in plain:
        torch.testing.assert_close(out[name], plain[name])
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_temperature_is_held_at_its_bound():
    from pretrain.models.init import initialise

    temperature = Temperature(0.07, 100.0)
    initialise(temperature, 0)
    assert temperature.log_scale.shape == (1,)
    assert temperature().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        temperature.log_scale.fill_(9.0)
    assert temperature().item() == pytest.approx(100.0)
    assert temperature.half()().dtype == torch.float32
    with pytest.raises(ValidationError, match=r"is below 1 / max_scale \(0\.01\)"):
        ContrastiveSettings(temperature=0.005)
    assert ContrastiveSettings(temperature=1 / 100, max_scale=100).temperature == 0.01


def test_an_encoder_must_be_there():
    encoders = dict(pair_model().encoders)
    with pytest.raises(ValueError, match=r"encoder 'texts' is not in model\.encoders"):
        ContrastiveSettings(text_encoder="texts").build(BuildContext(encoders, None, MEAN, STD))


def test_flops_leave_padding_out():
    model, batch = pair_model(), pair_batch(6)
    objective = model.objectives["contrast"]
    each = objective.flops(batch) // 6
    image, text = model.encoders["image"].flops(16, 16), model.encoders["text"].flops(8)
    assert each == 3 * (image + text + 2 * 8 * (16 + 12))
    assert objective.flops(rows_of(batch, [0, 1, -1])) == 2 * each


# ---- retrieval -----------------------------------------------------------------------------------


def recalls_by_hand(image, text, image_of, kind) -> dict[str, float]:
    similarity = (image @ text.T).tolist()
    kinds = [{kind[t] for t in range(len(text)) if image_of[t] == i} for i in range(len(image))]
    match = [[kind[t] in kinds[i] for t in range(len(text))] for i in range(len(image))]
    queries = {
        "image_to_text": list(zip(similarity, match, strict=True)),
        "text_to_image": [
            ([row[t] for row in similarity], [row[t] for row in match]) for t in range(len(text))
        ],
    }
    found = {}
    for name, rows in queries.items():
        for k in (1, 5, 10):
            best = [
                sorted(zip(s, m, strict=True), key=lambda p: (-p[0], p[1]))[:k] for s, m in rows
            ]
            found[f"{name}_r{k}"] = sum(any(m for _, m in top) for top in best) / len(rows)
    return found


@pytest.mark.parametrize("images", [3, 300])
def test_recalls_equal_sorting_by_hand(images):
    """Two to three texts an image, some captions on several images; more than one chunk."""
    generator = torch.Generator().manual_seed(1)
    image_of = torch.arange(images).repeat_interleave(3)[:-1]
    kind = torch.randint(0, images * 2, image_of.shape, generator=generator)
    image = F.normalize(torch.randn(images, 8, generator=generator), dim=1)
    noise = 0.4 * torch.randn(len(image_of), 8, generator=generator)
    text = F.normalize(image[image_of] + noise, dim=1)
    found = retrieval_recalls(image, text, image_of, kind * 1000 - 5)
    assert found == pytest.approx(recalls_by_hand(image, text, image_of.tolist(), kind.tolist()))
    assert images == 3 or 0.05 < found["image_to_text_r1"] < found["image_to_text_r10"] < 1


def test_collapsed_features_find_nothing():
    same = F.normalize(torch.ones(20, 4), dim=1)
    found = retrieval_recalls(same, same, torch.arange(20), torch.arange(20))
    assert set(found.values()) == {0.0}
    assert retrieval_recalls(same[:0], same[:0], torch.arange(0), torch.arange(0)) == {}


def evaluation_batches(ranks: int) -> list[list[dict]]:
    """The same 10 images with up to 3 texts each, as batches for so many ranks."""
    batch = pair_batch(10)
    tokens = torch.cat([pair_batch(10, seed)["tokens"] for seed in (0, 1, 2)], dim=1)
    mask = torch.cat([pair_batch(10, seed)["loss_mask"] for seed in (0, 1, 2)], dim=1)
    mask[4, 1:] = False  # an image with one text
    batch |= {"tokens": tokens, "loss_mask": mask}
    per = 10 // ranks // 2 + 1
    rows = [
        (start + i if start + i < 10 else -1)
        for start in range(0, 2 * ranks * per, per)
        for i in range(per)
    ]
    parts = [rows_of(batch, rows[s : s + per]) for s in range(0, len(rows), per)]
    return [parts[rank::ranks] for rank in range(ranks)]


def evaluate(model, ranks: int) -> list[dict]:
    """Metrics on every rank; the ranks run one after the other, twice, to see all shares."""
    shares: list = []
    batches = evaluation_batches(ranks)

    def run(rank: int, reduce):
        return model.objectives["contrast"].evaluate(
            model.encoders, batches[rank], EvaluationContext(torch.device("cpu"), reduce=reduce)
        )

    for rank in range(ranks):
        run(rank, lambda mine: [shares.append(mine), mine][1:])
    found = [run(rank, lambda mine: shares) for rank in range(ranks)]
    assert all(examples == [] for _, examples in found)
    return [metrics for metrics, _ in found]


def test_evaluation_is_the_same_on_any_number_of_ranks():
    model = pair_model(dropout=0.5).train()
    (alone,) = evaluate(model, 1)
    assert (alone["images"], alone["texts"]) == (10, 28)
    assert alone["temperature"] == pytest.approx(0.2)
    assert 0 < alone["image_to_text_r5"] <= alone["image_to_text_r10"] <= 1
    two, three = evaluate(model, 2), evaluate(model, 3)
    for other in (*two, *three):
        assert other == pytest.approx(alone)
    assert model.training and model.encoders["text"].training


def test_evaluation_may_be_strict():
    model = pair_model(identical_captions_match=False)
    (strict,) = evaluate(model, 1)
    model.objectives["contrast"].identical_captions_match = True
    (kind,) = evaluate(model, 1)
    assert strict["image_to_text_r5"] <= kind["image_to_text_r5"]
    assert strict["text_to_image_r1"] < kind["text_to_image_r1"]
    assert not math.isnan(strict["text_to_image_r1"])
