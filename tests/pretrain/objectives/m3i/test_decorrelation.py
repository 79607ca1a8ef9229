"""The loss of dense targets against the n x n formulation, and measures of collapse."""

import logging

import pytest
import torch
import torch.nn.functional as F

from pretrain.objectives.m3i.collapse import EVERY_STEPS, CollapseWatch, warn_of_collapse
from pretrain.objectives.m3i.decorrelation import (
    Moments,
    decorrelated_squares,
    effective_rank,
    normalised_targets,
    target_deviation,
    target_moments,
)


def features(images=6, tokens=5, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(images, tokens, width, generator=generator).requires_grad_()
    target = F.layer_norm(torch.randn(images, tokens, width, generator=generator), (width,))
    return prediction, target


def test_the_negative_term_equals_the_one_of_all_similarities():
    """As the reference has it: the diagonal of (P T') (P T')' / n, an n x n matrix."""
    prediction, target = features()
    valid = torch.ones(6, dtype=torch.bool)
    moments = target_moments(target, valid, torch.tensor([3.0, 3.0]))
    for kind in range(2):
        p, t = prediction[kind::2], target[kind::2]
        found = decorrelated_squares(p, t, moments.correlation[kind], 0.02).mean()
        flat_p, flat_t = p.flatten(0, 1), t.flatten(0, 1)
        similarity = flat_p @ flat_t.T
        negative = torch.diagonal(similarity @ similarity.T / len(flat_t)).mean()
        wanted = ((flat_p - flat_t).square().sum(1).mean() + 0.02 * negative) / 8
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(x, prediction, retain_graph=True)[0] for x in (found, wanted)]
        torch.testing.assert_close(*grads)
    strong = decorrelated_squares(prediction, target, moments.correlation[0], 0.5).mean()
    assert (
        strong
        > 1.02 * decorrelated_squares(prediction, target, moments.correlation[0], 0.02).mean()
    )


def test_padding_rows_are_not_in_the_moments():
    _, target = features()
    valid = torch.tensor([True, True, True, False, True, True])
    moments = target_moments(target, valid, torch.tensor([3.0, 2.0]))
    inter = target[[1, 5]].flatten(0, 1)
    torch.testing.assert_close(moments.correlation[1], inter.T @ inter / len(inter))
    torch.testing.assert_close(moments.mean[0], target[::2].flatten(0, 1).mean(0))


def test_targets_are_centred_over_what_counts():
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)) + 3
    valid = torch.tensor([True, False, True, True])
    found = normalised_targets(tokens, valid, torch.tensor(3.0), center=True)
    middle = tokens[valid].flatten(0, 1).mean(0)
    torch.testing.assert_close(found, F.layer_norm(tokens - middle, (8,)))
    # A direction that all share is nothing to be predicted.
    shared = tokens + 100 * torch.arange(8.0)
    again = normalised_targets(shared, valid, torch.tensor(3.0), center=True)
    torch.testing.assert_close(again, found, atol=1e-3, rtol=0)
    plain = normalised_targets(tokens, valid, torch.tensor(3.0), center=False)
    torch.testing.assert_close(plain, F.layer_norm(tokens, (8,)))


def moments_of(rows: torch.Tensor):
    both = torch.stack([rows, rows])[:, None].reshape(2, len(rows), -1)
    return target_moments(both, torch.ones(2, dtype=torch.bool), torch.ones(2))


def test_effective_rank_and_deviation():
    shares = torch.tensor([0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 12, generator=generator)
    values = torch.linalg.svdvals(rows - rows.mean(0)).double()
    parts = values / values.sum()
    wanted = torch.exp(-(parts * parts.log()).sum())
    assert effective_rank(moments_of(rows), shares).item() == pytest.approx(wanted.item(), rel=1e-4)
    deviation = rows.std(0, correction=0).mean().item()
    assert target_deviation(moments_of(rows), shares).item() == pytest.approx(deviation, rel=1e-4)
    line = torch.randn(300, 1, generator=generator) @ torch.randn(1, 12, generator=generator)
    assert effective_rank(moments_of(line + 3), shares) < 1.1
    # Two kinds of images that differ in nothing but their mean.
    apart = torch.stack([rows, rows + 5 * torch.eye(12)[0]])
    found = target_moments(apart, torch.ones(2, dtype=torch.bool), torch.ones(2))
    joined = apart.flatten(0, 1).std(0, correction=0).mean().item()
    assert target_deviation(found, shares).item() == pytest.approx(joined, rel=1e-4)


def test_the_alarm_fires_for_few_directions_and_for_small_differences(caplog):
    with caplog.at_level(logging.WARNING, "omnipretrain.collapse"):
        assert not warn_of_collapse(6.5, 0.31, 64) and not caplog.records
        assert warn_of_collapse(6.3, 0.9, 64) and warn_of_collapse(40.0, 0.29, 64)
    assert "effective rank of 6.3 of 64" in caplog.text
    assert "standard deviation of 0.29: they collapse" in caplog.text


def test_targets_that_are_not_finite_are_for_the_loop_to_judge(caplog):
    """They end no run here, are no collapse, and leave no mark."""
    broken = Moments(torch.full((2, 4), torch.nan), torch.full((2, 4, 4), torch.nan))
    shares, watch = torch.tensor([0.5, 0.5]), CollapseWatch()
    assert effective_rank(broken, shares).isnan()
    watch.rank.fill_(3.5)
    with caplog.at_level(logging.WARNING, "omnipretrain.collapse"):
        found = watch.observe(
            lambda: effective_rank(broken, shares), target_deviation(broken, shares), 4
        )
        assert not warn_of_collapse(float("nan"), float("nan"), 4)
    assert found == 3.5 and watch.steps == 1 and not caplog.records


def test_the_watch_measures_now_and_then():
    watch, calls = CollapseWatch(), []

    def measure():
        calls.append(int(watch.steps))
        return torch.tensor(30.0 + len(calls))

    found = [watch.observe(measure, torch.tensor(0.9), 64).item() for _ in range(EVERY_STEPS + 1)]
    assert calls == [0, EVERY_STEPS] and found == [31.0] * EVERY_STEPS + [32.0]
    other = CollapseWatch()
    other.load_state_dict(watch.state_dict())
    assert other.observe(measure, torch.tensor(0.9), 64) == 32.0 and len(calls) == 2
