"""Graphs that are refused before DeepSpeed sees them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.engine.zero.backward import UnsafeGraph, run_backward


def engine_of(seen: list) -> SimpleNamespace:
    return SimpleNamespace(backward=lambda loss, scale_wrt_gas: seen.append(loss))


@pytest.mark.parametrize("outer", [False, None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_refused_wherever_it_is(reentrant, outer):
    """Alone, and within a part that is recomputed rightly."""
    layer, passed = nn.Linear(3, 3), []
    inputs = torch.ones(2, 3, requires_grad=True)

    def inner(values):
        return checkpoint(layer, values, use_reentrant=reentrant)

    hidden = inner(inputs) if outer is None else checkpoint(inner, inputs, use_reentrant=outer)
    loss = torch.relu(hidden).sum() * 2
    if reentrant:
        with pytest.raises(UnsafeGraph, match=r"tasks\.words: .*use_reentrant=False"):
            run_backward(engine_of(passed), loss, "words")
        assert not passed
    else:
        run_backward(engine_of(passed), loss, "words")
        assert len(passed) == 1


def test_a_loss_without_a_trained_parameter_is_named():
    with pytest.raises(UnsafeGraph, match=r"tasks\.words: no trained parameter.*optimizer\.frozen"):
        run_backward(engine_of([]), torch.ones(()), "words")


def test_a_later_pass_is_looked_at_once():
    engine, loss = engine_of([]), torch.ones((), requires_grad=True) * 2
    for number in (0, 1, 0, 1):
        run_backward(engine, loss, "words", number)
    assert engine.graphs_seen == {("words", 0), ("words", 1)}
