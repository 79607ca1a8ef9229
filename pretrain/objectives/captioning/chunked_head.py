"""Scores over the vocabulary and their loss, a few rows at a time: logits are never whole.

A row's gradient is known as soon as its scores are, up to one factor that all rows share. So both
are computed in the forward pass, which is as many products as before, and kept are one gradient of
the hidden state and one of the matrix, in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a chunk of scores: 256 MiB in float32. Smaller ones pass more often over the gradient
# of the matrix than the products take.
_CHUNK_ELEMENTS = 1 << 26
# Elements of a product that is widened to be added to the gradient of the matrix.
_PRODUCT_ELEMENTS = 1 << 24


def smoothed_cross_entropy_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows of the smoothed loss, the plain cross-entropy, and the correct guesses.

    Scores are `hidden @ weight.T + bias`. The smoothed loss is the Kullback-Leibler divergence from
    a target that gives 1 - smoothing to the label and smoothing / (V - 1) to every other word
    (GIT's form; it is 0 for a perfect fit). torch's `label_smoothing` gives smoothing / V to all
    words and leaves the entropy in.

    hidden: (P, D); weight: (V, D); bias: (V,); any float dtype, in which the products are taken.
    targets: (P,) int64; weights: (P,) float32, one per row.
    Returns three 0-dim float32 tensors; only the first carries a gradient, and only once: autograd
    refuses a second backward pass.
    """
    # Inside `forward` nothing tells an evaluation from a training step.
    learns = torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, weight, bias, targets, weights, smoothing, learns)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, smoothing, learns):
        words, device = len(weight), hidden.device
        other = smoothing / (words - 1)
        sums = torch.zeros(3, dtype=torch.float32, device=device)
        needed = tuple(learns and needed for needed in ctx.needs_input_grad)
        gradients = _gradients(needed, hidden, weight, bias)
        step = max(1, _CHUNK_ELEMENTS // words)
        for start in range(0, len(hidden), step):
            part = slice(start, min(start + step, len(hidden)))
            label, share = targets[part, None], weights[part]
            scores = F.linear(hidden[part], weight, bias).float()
            log_sum = scores.logsumexp(dim=1)
            of_label = scores.gather(1, label)[:, 0]
            smoothed = log_sum - (1 - smoothing - other) * of_label - other * scores.sum(dim=1)
            hit = (scores.argmax(dim=1) == targets[part]).float()
            losses = smoothed - _entropy(smoothing, words), log_sum - of_label, hit
            sums += torch.stack([(loss * share).sum() for loss in losses])
            if gradients:
                slope = scores.sub_(log_sum[:, None]).exp_().sub_(other)
                slope.scatter_add_(1, label, torch.full_like(share, smoothing + other - 1)[:, None])
                _add(gradients, slope.mul_(share[:, None]), hidden, weight, part)
        ctx.save_for_backward(*gradients.values())
        ctx.names = list(gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        loss, cross_entropy, hits = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, hits)
        return loss, cross_entropy, hits

    @staticmethod
    def backward(ctx, grad_loss, _grad_cross_entropy, _grad_hits):
        found = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        # In place: another gradient of the matrix would be as large as the first.
        given = [
            found[name].mul_(grad_loss).to(dtype) if name in found else None
            for name, dtype in zip(("hidden", "weight", "bias"), ctx.dtypes, strict=True)
        ]
        return *given, None, None, None, None


def _gradients(needed: tuple[bool, ...], *inputs: Tensor) -> dict[str, Tensor]:
    """Zeros in float32 for each input that wants a gradient."""
    names = zip(("hidden", "weight", "bias"), inputs, needed, strict=False)
    return {n: torch.zeros_like(x, dtype=torch.float32) for n, x, wanted in names if wanted}


def _add(
    gradients: dict[str, Tensor], slope: Tensor, hidden: Tensor, weight: Tensor, part: slice
) -> None:
    """Add what the scores of some rows give; slope: (rows, V) float32."""
    if "bias" in gradients:
        gradients["bias"] += slope.sum(dim=0)
    slope = slope.to(weight.dtype)
    if "hidden" in gradients:
        gradients["hidden"][part] = slope @ weight
    if "weight" in gradients and weight.dtype == torch.float32:
        gradients["weight"].addmm_(slope.T, hidden[part])
    elif "weight" in gradients:
        step = max(1, _PRODUCT_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), step):
            words = slice(start, start + step)
            gradients["weight"][words] += slope[:, words].T @ hidden[part]


def _entropy(smoothing: float, words: int) -> float:
    """Sum of q log q, negated: the entropy of the smoothed target, in nats."""
    if smoothing == 0:
        return 0.0
    label = (1 - smoothing) * math.log(1 - smoothing)
    return -(label + smoothing * math.log(smoothing / (words - 1)))
