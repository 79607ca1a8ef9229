"""The loss of scores that are never whole is that of whole ones, at a bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.objectives.captioning import chunked_head
from pretrain.objectives.captioning.chunked_head import smoothed_cross_entropy_of
from pretrain.objectives.captioning.token_loss import smoothed_cross_entropy

ROWS, WORDS, WIDTH = 37, 301, 16


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (WORDS, WIDTH))]
    made.append(torch.randn(WORDS, generator=generator))
    weights = torch.ones(ROWS)
    weights[5] = 0
    targets = torch.randint(WORDS, (ROWS,), generator=generator)
    return [t.to(dtype).requires_grad_() for t in made], targets, weights


def whole(tensors, targets, weights, smoothing):
    hidden, weight, bias = tensors
    return smoothed_cross_entropy(hidden @ weight.T + bias, targets, weights, smoothing)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows_at_once", [1, 8, 100])
def test_as_with_whole_scores(smoothing, rows_at_once, monkeypatch):
    monkeypatch.setattr(chunked_head, "_CHUNK_ELEMENTS", WORDS * rows_at_once)
    ours, targets, weights = inputs()
    theirs = [t.detach().double().requires_grad_() for t in ours]
    wanted = whole(theirs, targets, weights, smoothing)
    (wanted[0] * 0.3).backward()
    with Largest() as largest:
        found = smoothed_cross_entropy_of(*ours, targets, weights, smoothing)
        (found[0] * 0.3).backward()
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted).float(), rtol=1e-6, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=1e-6)
    assert largest.elements <= max(WORDS * min(rows_at_once, ROWS), WORDS * WIDTH)
    assert not found[1].requires_grad and not found[2].requires_grad


def test_gradients_of_chunks_add_up_in_float32(monkeypatch):
    """In bfloat16 thousands of small shares would be lost beside their sum."""
    monkeypatch.setattr(chunked_head, "_CHUNK_ELEMENTS", WORDS)
    ours, targets, weights = inputs(torch.bfloat16)
    found = smoothed_cross_entropy_of(*ours, targets, weights, 0.1)
    found[0].backward()
    exact = [t.detach().double().requires_grad_() for t in ours]
    whole(exact, targets, weights, 0.1)[0].backward()
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        error = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.006  # of one rounding to bfloat16 and of the scores


def test_only_what_is_asked_for(monkeypatch):
    ours, targets, weights = inputs()
    ours[1].requires_grad_(False)
    smoothed_cross_entropy_of(*ours, targets, weights, 0.1)[0].backward()
    assert ours[0].grad is not None and ours[1].grad is None and ours[2].grad is not None
    with torch.no_grad(), Largest() as largest:
        monkeypatch.setattr(chunked_head, "_CHUNK_ELEMENTS", WORDS)
        assert not smoothed_cross_entropy_of(*ours, targets, weights, 0.1)[0].requires_grad
    assert largest.elements <= WORDS * WIDTH
