"""Loss weights by gradient norms: closed forms, smoothing, bounds, bits through a cast."""

import pytest
import torch
from pydantic import ValidationError

from pretrain.objectives.m3i.loss_balance import BalanceSettings, LossBalance
from tests.pretrain.objectives.m3i.m3i_models import m3i_batch, m3i_model

KINDS = ("a", "b", "c")


def losses(shared: torch.Tensor, factors: dict) -> dict:
    """Losses whose gradients with respect to `shared` have norm factor x 2."""
    return {kind: factor * shared.sum() for kind, factor in factors.items()}


def test_factors_equal_the_rule():
    balance = LossBalance(KINDS, BalanceSettings(every_steps=1, smoothing=0.9))
    shared = torch.ones(4, requires_grad=True)
    assert {k: f.item() for k, f in balance.factors().items()} == dict.fromkeys(KINDS, 1.0)
    balance.observe(losses(shared, {"a": 1.0, "b": 3.0, "c": 8.0}), shared)
    norms = torch.tensor([2.0, 6.0, 16.0])
    wanted = norms.mean() / norms
    torch.testing.assert_close(torch.stack(list(balance.factors().values())), wanted)
    balance.observe(losses(shared, {"a": 5.0, "b": 3.0, "c": 0.0}), shared)
    norms = torch.tensor([0.9 * 2 + 0.1 * 10, 6.0, 16.0])  # c had nothing to teach: as before
    torch.testing.assert_close(torch.stack(list(balance.factors().values())), norms.mean() / norms)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_skipped_leaves_no_mark(value):
    balance = LossBalance(KINDS, BalanceSettings(every_steps=1))
    shared = torch.ones(4, requires_grad=True)
    balance.observe(losses(shared, {"a": 1.0, "b": 3.0, "c": 8.0}), shared)
    before = balance.factors()
    balance.observe(losses(shared, {"a": value, "b": 3.0, "c": 8.0}), shared)
    for kind, factor in balance.factors().items():
        torch.testing.assert_close(factor, before[kind])


def test_factors_are_bounded_and_measured_when_due():
    balance = LossBalance(KINDS, BalanceSettings(every_steps=3, limits=(0.5, 2.0)))
    shared = torch.ones(4, requires_grad=True)
    for factor in (1.0, 50.0, 50.0):
        balance.observe(losses(shared, {"a": factor, "b": 100.0, "c": 10.0}), shared)
    found = {k: f.item() for k, f in balance.factors().items()}
    assert found == {"a": 2.0, "b": 0.5, "c": 2.0}
    balance.bfloat16()
    before = balance.norm_bits.view(torch.float32).clone()
    balance.observe(losses(shared, {"a": 50.0, "b": 100.0, "c": 10.0}), shared)
    assert balance.norm_bits.view(torch.float32)[0] == pytest.approx(0.9 * before[0] + 0.1 * 100)
    other = LossBalance(KINDS, balance.settings)
    other.load_state_dict(balance.state_dict())
    assert other.factors() == balance.factors()


def test_m3i_weighs_by_its_own_gradients():
    """After the first step every loss sends a gradient of the same norm into the encoder."""
    model = m3i_model(balance={"limits": [1e-3, 1e3]}, weights={"text": 2.0})
    objective, batch = model.objectives["m3i"], m3i_batch(8)
    totals = objective.counts(batch)
    out = model("m3i", "undivided", batch, totals)
    found = {k: out[f"weight_{k}"].item() for k in ("intra", "inter", "text", "category")}
    wanted = sum(found[kind] * out[kind] for kind in found)
    torch.testing.assert_close(out["loss"].detach(), wanted)
    caught = {}
    original = objective._shares

    def shares(features, totals, dense):
        caught["features"], caught["dense"] = features, dense
        return original(features, totals, dense)

    objective._shares = shares
    model("m3i", "undivided", batch, totals)
    from pretrain.objectives.m3i.loss import m3i_losses

    counts = {name: torch.tensor(float(n)) for name, n in totals.items()}
    parts, *_ = m3i_losses(caught["features"], counts, 0.02, 0.0, True)
    norms = {
        kind: (
            found[kind] * torch.autograd.grad(parts[kind], caught["dense"], retain_graph=True)[0]
        )
        .norm()
        .item()
        for kind in found
    }
    for kind in ("inter", "category"):
        assert norms[kind] == pytest.approx(norms["intra"], rel=1e-4)
    assert norms["text"] == pytest.approx(2 * norms["intra"], rel=1e-4)
    with torch.no_grad():
        model.eval()
        assert "weight_intra" not in model("m3i", "undivided", batch, totals)


def test_impossible_limits():
    with pytest.raises(ValidationError, match=r"0 < low <= 1 <= high"):
        BalanceSettings(limits=(2.0, 3.0))
