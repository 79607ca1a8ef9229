"""The classification objective: shares, samples without labels, torch as an oracle, evaluation."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.objective import EvaluationContext
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.objectives.pair_models import (
    CLASSES,
    gradients,
    pair_batch,
    pair_model,
    rows_of,
)


def loss_and_gradients(model, batch, totals=None):
    model.zero_grad()
    totals = totals or model.objectives["classify"].counts(batch)
    out = model("classify", "undivided", batch, totals)
    out["loss"].backward()
    return out, gradients(model)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_equals_torch_on_the_labelled_images(pool):
    model, batch = pair_model(), pair_batch(12)
    objective = model.objectives["classify"]
    objective.pool = pool
    labels = batch["labels"]
    assert objective.counts(batch) == {"images": 12, "labels": int((labels >= 0).sum())}
    assert 0 < (labels >= 0).sum() < 12
    out, found = loss_and_gradients(model, batch)
    pixels = batch["images"] / 255 - torch.tensor(MEAN).view(3, 1, 1)
    tokens = model.encoders["image"](pixels / torch.tensor(STD).view(3, 1, 1))
    logits = objective.head(tokens.mean(1) if pool == "mean" else tokens[:, 0])[labels >= 0]
    labels = labels[labels >= 0]
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(out["cross_entropy"], F.cross_entropy(logits, labels))
    order = logits.argsort(dim=1, descending=True)
    for name, best in (("top1", 1), ("top5", 5)):
        hits = (order[:, :best] == labels[:, None]).any(1).float().mean()
        torch.testing.assert_close(out[name], hits)
    assert out["labelled"].item() == pytest.approx(len(labels) / 12)
    assert found["objectives.classify.head.weight"].abs().max() > 1e-3


def test_shares_sum_to_the_whole():
    model, batch = pair_model(), pair_batch(11)
    totals = model.objectives["classify"].counts(batch)
    whole, wanted = loss_and_gradients(model, batch)
    parts = [[0], [1, 2, 3, -1], [4, 5, 6, 7, 8, 9, 10, -1]]
    shares = [loss_and_gradients(model, rows_of(batch, rows), totals) for rows in parts]
    for name in whole:
        assert sum(s[0][name].item() for s in shares) == pytest.approx(whole[name].item(), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(sum(s[1][name] for s in shares), gradient, rtol=1e-4, atol=1e-6)


def test_totals_may_be_tensors():
    model, batch = pair_model(), pair_batch(5)
    totals = model.objectives["classify"].counts(batch)
    tensors = {name: torch.tensor(float(value)) for name, value in totals.items()}
    one, other = (model("classify", "undivided", batch, t)["loss"] for t in (totals, tensors))
    assert torch.equal(one, other)


def test_nothing_labelled_gives_zero_through_every_parameter():
    model, batch = pair_model(), pair_batch(4)
    batch["labels"][:] = -1
    out, found = loss_and_gradients(model, batch, {"images": 8, "labels": 3})
    assert [float(out[name].detach()) for name in out] == [0.0] * 5
    names = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("encoders.image.", "objectives.classify."))
    }
    assert set(found) == names
    assert not any(gradient.any() for gradient in found.values())
    # Nor does a whole global batch without labels divide by zero.
    assert loss_and_gradients(model, batch, {"images": 0, "labels": 0})[0]["loss"] == 0


def test_fewer_classes_than_five():
    settings = ClassificationSettings(label_smoothing=0.0)
    model = pair_model()
    objective = settings.build(BuildContext(dict(model.encoders), None, MEAN, STD, classes=3))
    logits, labels = torch.tensor([[3.0, 2, 1], [1, 2, 3]]), torch.tensor([1, -1])
    loss, cross_entropy, top1, top5 = objective.label_sums(logits, labels)
    assert loss == cross_entropy and (top1, top5) == (0, 1)


def soft_batch(count: int) -> dict:
    """Probabilities of classes; every fifth image has none."""
    batch = pair_batch(count)
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(count, CLASSES, generator=generator).pow(4)
    targets /= targets.sum(1, keepdim=True)
    labels = targets.argmax(1)
    labels[::5], targets[::5] = -1, 0
    return batch | {"labels": labels, "targets": targets}


def test_soft_targets_equal_torch_on_the_labelled_images():
    model, batch = pair_model(), soft_batch(12)
    known = batch["labels"] >= 0
    out, found = loss_and_gradients(model, batch)
    pixels = batch["images"] / 255 - torch.tensor(MEAN).view(3, 1, 1)
    tokens = model.encoders["image"](pixels / torch.tensor(STD).view(3, 1, 1))
    logits = model.objectives["classify"].head(tokens.mean(1))[known]
    targets = batch["targets"][known]
    torch.testing.assert_close(
        out["cross_entropy"], -(targets * logits.log_softmax(1)).sum(1).mean()
    )
    smooth = 0.9 * targets + 0.1 / CLASSES
    torch.testing.assert_close(out["loss"], -(smooth * logits.log_softmax(1)).sum(1).mean())
    hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
    torch.testing.assert_close(out["top1"], hits)
    assert found["objectives.classify.head.weight"].abs().max() > 1e-3


def test_certain_soft_targets_are_labels():
    model, batch = pair_model(), pair_batch(12)
    known = (batch["labels"] >= 0)[:, None]
    hard, wanted = loss_and_gradients(model, batch)
    targets = F.one_hot(batch["labels"].clamp(min=0), CLASSES) * known
    soft, found = loss_and_gradients(model, batch | {"targets": targets.float()})
    for name in hard:
        torch.testing.assert_close(soft[name], hard[name])
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_evaluation_with_soft_targets():
    model, batch = pair_model(), soft_batch(11)
    objective = model.objectives["classify"]
    whole, _ = loss_and_gradients(model, batch)
    found, _ = objective.evaluate(model.encoders, [batch], EvaluationContext(torch.device("cpu")))
    for name in ("loss", "cross_entropy", "top1", "top5", "labelled"):
        assert found[name] == pytest.approx(whole[name].item(), rel=1e-5)


def test_the_first_weights_of_the_head_have_the_deviation_that_the_recipe_says():
    for std in (0.0, 2e-5, 0.02):
        model = pair_model()
        encoders = dict(model.encoders)
        context = BuildContext(encoders, None, MEAN, STD, 1000)
        objective = ClassificationSettings(head_std=std).build(context)
        initialise(objective, 0)
        assert objective.head.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not objective.head.bias.any()


def test_an_encoder_must_be_there():
    with pytest.raises(ValueError, match=r"'eye' is not in model\.encoders \(image, text\)"):
        ClassificationSettings(encoder="eye").build(
            BuildContext(dict(pair_model().encoders), None, MEAN, STD, classes=3)
        )


def test_flops_leave_padding_out():
    model, batch = pair_model(), pair_batch(6)
    objective = model.objectives["classify"]
    each = 3 * (model.encoders["image"].flops(16, 16) + 2 * 16 * CLASSES)
    assert objective.flops(batch) == 6 * each
    assert objective.flops(rows_of(batch, [0, -1])) == each


def test_evaluation_counts_every_sample_once_over_ranks():
    model, batch = pair_model().train(), pair_batch(11)
    objective = model.objectives["classify"]
    whole, _ = loss_and_gradients(model, batch)
    parts = [
        rows_of(batch, [*range(s, min(s + 3, 11)), *[-1] * (s + 3 - 11)][:3])
        for s in range(0, 12, 3)
    ]
    shares: list = []

    def run(rank: int, reduce):
        context = EvaluationContext(torch.device("cpu"), reduce=reduce)
        return objective.evaluate(model.encoders, parts[rank::2], context)

    for rank in range(2):
        run(rank, lambda mine: [shares.append(mine), mine][1:])
    (one, examples), (other, _) = (run(rank, lambda mine: shares) for rank in range(2))
    assert one == other and examples == [] and one["images"] == 11
    for name in ("loss", "cross_entropy", "top1", "top5", "labelled"):
        assert one[name] == pytest.approx(whole[name].item(), rel=1e-5)
    assert model.training
    assert run(0, lambda mine: [mine])[0]["images"] == 6
