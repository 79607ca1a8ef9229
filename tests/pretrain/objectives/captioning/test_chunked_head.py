"""The loss of scores that are never whole is that of whole ones, at a bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.objectives.captioning import chunked_head
from pretrain.objectives.captioning.chunked_head import smoothed_cross_entropy_of

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
    """The three sums by definition: Kullback-Leibler divergence, word by word."""
    hidden, weight, bias = tensors
    logits = hidden @ weight.T + bias
    words = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (words - 1))
    wanted.scatter_(1, targets[:, None], 1 - smoothing)
    divergence = F.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1)
    plain = F.cross_entropy(logits, targets, reduction="none")
    hits = (logits.argmax(1) == targets).to(logits.dtype)
    return [(each * weights).sum() for each in (divergence, plain, hits)]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return found


class New(TorchDispatchMode):
    """Dtypes of the new memory of so many elements that operations have made."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.dtypes, self.seen = elements, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held = tree_leaves((args, kwargs or {}))
        self.seen |= {t.data_ptr() for t in held if isinstance(t, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for made in tree_leaves(found):
            large = isinstance(made, torch.Tensor) and made.numel() == self.elements
            if large and made.data_ptr() not in self.seen:
                self.dtypes.append(made.dtype)
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
    asked = []
    real = chunked_head._gradients
    monkeypatch.setattr(
        chunked_head, "_gradients", lambda *given: asked.append(real(*given)) or asked[-1]
    )
    with torch.no_grad():
        assert not smoothed_cross_entropy_of(*ours, targets, weights, 0.1)[0].requires_grad
    assert asked == [{}]  # an evaluation takes no gradient


def test_the_gradient_of_the_matrix_lies_in_memory_once(monkeypatch):
    """In bfloat16 nothing as large as it is made but it and what is handed on."""
    monkeypatch.setattr(chunked_head, "_CHUNK_ELEMENTS", WORDS)
    monkeypatch.setattr(chunked_head, "_PRODUCT_ELEMENTS", 16 * WIDTH)
    ours, targets, weights = inputs(torch.bfloat16)
    with New(WORDS * WIDTH) as new:
        smoothed_cross_entropy_of(*ours, targets, weights, 0.1)[0].backward()
    assert new.dtypes == [torch.float32, torch.bfloat16]


def test_a_second_backward_pass_is_refused():
    ours, targets, weights = inputs()
    loss = smoothed_cross_entropy_of(*ours, targets, weights, 0.1)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_perfect_fit_is_zero_and_huge_scores_stay_finite():
    wanted = torch.full((1, 50), 0.1 / 49)
    wanted[0, 7] = 0.9
    ones = torch.ones(1)
    found = smoothed_cross_entropy_of(
        wanted.log(), torch.eye(50), None, torch.tensor([7]), ones, 0.1
    )
    assert found[0].item() == pytest.approx(0, abs=1e-6) and found[2].item() == 1
    huge = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = smoothed_cross_entropy_of(huge, torch.eye(3), None, torch.tensor([1]), ones, 0.1)[0]
    loss.backward()
    assert loss.isfinite() and huge.grad.isfinite().all()
