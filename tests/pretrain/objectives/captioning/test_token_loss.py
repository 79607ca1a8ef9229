"""The smoothed loss against its definition."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.captioning import token_loss
from pretrain.objectives.captioning.token_loss import smoothed_cross_entropy


def by_definition(logits, targets, weights, smoothing):
    """Kullback-Leibler divergence, word by word, in float64."""
    words = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (words - 1))
    wanted.scatter_(1, targets[:, None], 1 - smoothing)
    divergence = F.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1)
    return (divergence * weights).sum()


@pytest.fixture
def case():
    torch.manual_seed(0)
    logits = torch.randn(11, 23, dtype=torch.float64) * 3
    weights = torch.ones(11)
    weights[4] = 0
    return logits, torch.randint(23, (11,)), weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_value_and_gradient(case, smoothing, rows_at_once, monkeypatch) -> None:
    monkeypatch.setattr(token_loss, "_SLICE_ELEMENTS", 23 * rows_at_once)
    logits, targets, weights = case
    exact = logits.clone().requires_grad_()
    by_definition(exact, targets, weights, smoothing).mul(0.25).backward()
    ours = logits.float().requires_grad_()
    loss, cross_entropy, hits = smoothed_cross_entropy(ours, targets, weights, smoothing)
    loss.mul(0.25).backward()
    expected = by_definition(logits, targets, weights, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    plain = F.cross_entropy(logits, targets, reduction="none") * weights
    assert cross_entropy.item() == pytest.approx(plain.sum().item(), rel=1e-5)
    assert hits.item() == ((logits.argmax(1) == targets) * weights).sum().item()
    assert not cross_entropy.requires_grad and not hits.requires_grad


def test_bfloat16_logits_are_judged_in_float32(case) -> None:
    logits, targets, weights = case
    rough = logits.bfloat16().requires_grad_()
    loss, _, _ = smoothed_cross_entropy(rough, targets, weights, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and rough.grad.dtype == torch.bfloat16
    expected = by_definition(logits.bfloat16().double(), targets, weights, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_perfect_fit_is_zero() -> None:
    smoothing, words = 0.1, 50
    target = torch.full((1, words), smoothing / (words - 1))
    target[0, 7] = 1 - smoothing
    loss, _, hits = smoothed_cross_entropy(
        target.log(), torch.tensor([7]), torch.ones(1), smoothing
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert hits.item() == 1


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss, _, _ = smoothed_cross_entropy(logits, torch.tensor([1]), torch.ones(1), 0.1)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
