"""Held-out metrics of M3I against what all images give at once. On two ranks: test_m3i_run.py."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.contrastive.loss import caption_ids
from pretrain.objectives.m3i.loss import KINDS, m3i_losses
from pretrain.objectives.objective import EvaluationContext
from pretrain.objectives.retrieval import retrieval_recalls
from tests.pretrain.objectives.m3i.m3i_models import (
    features_of,
    follow,
    m3i_batch,
    m3i_model,
    m3i_rows,
)
from tests.pretrain.objectives.m3i.test_m3i import pixels_of, pooled, rank_of

COUNTED = {"intra": "intra", "inter": "inter", "text": "texts", "category": "labels"}
SETTINGS = {"decorrelation": 0.3, "label_smoothing": 0.2}


def held_out() -> dict:
    """11 images with up to two texts each, the last one beside a padding row; the sixth could not
    be read."""
    batch = m3i_batch(11)
    batch["labels"][:2] = 3
    second = batch["tokens"].roll(2, dims=0), batch["loss_mask"].roll(2, dims=0)
    batch["tokens"] = torch.cat([batch["tokens"], second[0]], dim=1)
    present = batch["loss_mask"].any(2, keepdim=True) & (torch.arange(11) % 3 > 0)[:, None, None]
    batch["loss_mask"] = torch.cat([batch["loss_mask"], second[1] & present], dim=1)
    batch["row"] = batch["position"] = 7 * torch.arange(11)
    return m3i_rows(batch, [0, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10, -1])


@pytest.fixture(scope="module")
def found():
    """Model, all images, its batches, and metrics of these."""
    model, batch = m3i_model(**SETTINGS).train(), held_out()
    follow(model, 0.5)
    training = []
    for encoder in model.encoders.values():
        encoder.register_forward_pre_hook(lambda module, _: training.append(module.training))
    loader = [m3i_rows(batch, range(start, start + 4)) for start in (0, 4, 8)]
    metrics, examples = model.objectives["m3i"].evaluate(
        model.encoders, loader, EvaluationContext(torch.device("cpu"))
    )
    assert training and not any(training), "no drop path here"
    assert examples == [] and model.training and model.encoders["text"].training
    assert not model.objectives["m3i"].target.training
    assert not int(model.objectives["m3i"].watch.steps)
    return model, batch, loader, metrics


def test_losses_weigh_by_what_they_count(found):
    model, batch, loader, metrics = found
    objective, sums = model.objectives["m3i"], dict.fromkeys(KINDS, 0.0)
    for part in loader:
        counts = objective.counts(part)
        draws = SampleDraws(0, "m3i evaluation", part["position"])
        features, _ = features_of(model, part, draws)
        totals = {name: torch.tensor(float(count)) for name, count in counts.items()}
        losses, *_ = m3i_losses(features, totals, 0.3, 0.2, True)
        for kind in KINDS:
            sums[kind] += losses[kind].item() * counts[COUNTED[kind]]
    counts = objective.counts(batch)
    assert len(set(counts.values())) == 5, "no two losses have the same divisor"
    for kind in KINDS:
        assert metrics[kind] == pytest.approx(sums[kind] / counts[COUNTED[kind]], rel=1e-5)
    assert metrics["images"] == counts["images"]


def test_whole_images(found):
    model, batch, _, metrics = found
    objective, encoder, labels = model.objectives["m3i"], model.encoders["image"], batch["labels"]
    with torch.no_grad():
        tokens = encoder(pixels_of(batch["images"]))[:, 1:]
        vectors = torch.stack([pooled(objective, encoder, own[None]) for own in tokens])
        scores = objective.head(objective.pool.norm(vectors))
        has = batch["loss_mask"].any(2)
        image_of = torch.arange(12)[:, None].expand(12, 2)[has]
        texts = model.encoders["text"](batch["tokens"][has]) @ objective.text_projection.weight.T
        kept = has.any(1).nonzero()[:, 0]
        recalls = retrieval_recalls(
            F.normalize(vectors[kept], dim=1),
            F.normalize(texts, dim=1),
            torch.searchsorted(kept, image_of),
            caption_ids(batch["tokens"], batch["loss_mask"])[has],
        )
    known = labels >= 0
    assert 0 < known.sum() < batch["valid"].sum() < 12
    assert metrics["top1"] == pytest.approx(
        (scores.argmax(1) == labels)[known].double().mean().item()
    )
    assert metrics["labelled"] == known.sum() / batch["valid"].sum()
    assert metrics["texts"] == has.sum() and has.sum(1).unique().tolist() == [0, 1, 2]
    assert {name: metrics[name] for name in recalls} == pytest.approx(recalls)
    assert 0 < recalls["image_to_text_r1"] < 1
    assert list(metrics)[:3] == ["top1", "image_to_text_r1", "text_to_image_r1"]


def test_spread_of_the_targets_of_all_batches(found):
    model, _, loader, metrics = found
    normed = []
    for part in loader:
        second = (torch.arange(4) % 2 == 1)[:, None, None, None]
        views = torch.where(second, part["second_images"], part["images"])[part["valid"]]
        tokens = model.objectives["m3i"].target(pixels_of(views))
        normed.append(F.layer_norm(tokens - tokens.mean((0, 1)), (32,)).flatten(0, 1))
    rows = torch.cat(normed)
    assert metrics["target_std"] == pytest.approx(rows.std(0, correction=0).mean().item(), rel=1e-4)
    assert metrics["effective_rank"] == pytest.approx(rank_of(rows).item(), rel=1e-3)
