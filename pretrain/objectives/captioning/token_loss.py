"""Label-smoothed cross-entropy over a large vocabulary, lean in memory.

Autograd's own path keeps the log-probabilities in float32 beside the logits and makes two more
copies in the backward pass. This one keeps the logits as they came and one number per row, works in
float32 on a slice of rows at a time, and writes one gradient in the dtype of the logits.
"""

import math

import torch
from torch import Tensor

# Elements of the float32 working copy: 64 MiB.
_SLICE_ELEMENTS = 1 << 24


def smoothed_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows of the smoothed loss, the plain cross-entropy, and the correct guesses.

    The smoothed loss is the Kullback-Leibler divergence from a target that gives 1 - smoothing to
    the label and smoothing / (V - 1) to every other word (GIT's form; it is 0 for a perfect fit).
    torch's `label_smoothing` gives smoothing / V to all words and leaves the entropy in.

    logits: (P, V) any float dtype; targets: (P,) int64; weights: (P,) float32, one per row.
    Returns three 0-dim float32 tensors; only the first carries a gradient.
    """
    return _SmoothedCrossEntropy.apply(logits, targets, weights, smoothing)


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, weights, smoothing):
        rows, words = logits.shape
        other = smoothing / (words - 1)
        log_sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
        label = torch.empty_like(log_sums)
        total = torch.empty_like(log_sums)
        hits = torch.empty_like(log_sums)
        for part in _slices(rows, words):
            scores = logits[part].float()
            log_sums[part] = scores.logsumexp(dim=1)
            label[part] = scores.gather(1, targets[part, None])[:, 0]
            total[part] = scores.sum(dim=1)
            hits[part] = (scores.argmax(dim=1) == targets[part]).float()
        # sum_w q_w (log_sum - score_w) with q = other everywhere and the rest on the label.
        cross_entropy = log_sums - label
        smoothed = log_sums - (1 - smoothing - other) * label - other * total
        loss = ((smoothed - smoothed_target_entropy(smoothing, words)) * weights).sum()
        ctx.save_for_backward(logits, targets, weights, log_sums)
        ctx.smoothing = smoothing
        outputs = loss, (cross_entropy * weights).sum(), (hits * weights).sum()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad_loss, _grad_cross_entropy, _grad_hits):
        logits, targets, weights, log_sums = ctx.saved_tensors
        rows, words = logits.shape
        other = ctx.smoothing / (words - 1)
        scale = (weights * grad_loss)[:, None]
        label_share = torch.full((rows, 1), -(1 - ctx.smoothing - other), device=logits.device)
        gradient = torch.empty_like(logits)
        for part in _slices(rows, words):
            slope = logits[part].float().sub(log_sums[part, None]).exp_().sub_(other)
            slope.scatter_add_(1, targets[part, None], label_share[part])
            gradient[part] = slope.mul_(scale[part])
        return gradient, None, None, None


def _slices(rows: int, words: int) -> list[slice]:
    step = max(1, _SLICE_ELEMENTS // words)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def smoothed_target_entropy(smoothing: float, words: int) -> float:
    """Sum of q log q, negated: the entropy of the smoothed target, in nats."""
    if smoothing == 0:
        return 0.0
    label = (1 - smoothing) * math.log(1 - smoothing)
    return -(label + smoothing * math.log(smoothing / (words - 1)))
