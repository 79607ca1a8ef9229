"""The loss of dense targets: squared distance plus decorrelation (UniGrad, as in SiameseIM).

With predictions P and targets T of n tokens with C channels, over the global batch,

    L = [ mean |p - t|^2 + lambda mean p' (T' T / n) p ] / C

where the correlation T' T / n carries no gradient. The mean of squares p' (T' T) p through the
C x C matrix equals the one through n x n similarities, which for a real batch do not fit.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def normalised_targets(tokens: Tensor, valid: Tensor, images: Tensor, center: bool) -> Tensor:
    """What is predicted of the target branch's tokens: mean 0 and variance 1 over channels.

    With `center` the mean token of the global batch is taken off first. A collective then.

    tokens: (B, N, C) float32; valid: (B,) bool; images: 0-dim, images of the global batch.
    """
    if center:
        sums = (tokens * valid[:, None, None]).sum(dim=(0, 1))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        tokens = tokens - sums / (images.clamp(min=1.0) * tokens.shape[1])
    return F.layer_norm(tokens, tokens.shape[-1:])


class Moments(NamedTuple):
    """First and second moments of the targets of the global batch, of two kinds of images."""

    mean: Tensor
    """(2, C) float32."""
    correlation: Tensor
    """(2, C, C) float32: mean of t t'."""


def target_moments(target: Tensor, valid: Tensor, totals: Tensor) -> Moments:
    """Moments over all ranks; a collective.

    target: (B, N, C) float32, rows 2i of the first kind and 2i + 1 of the second; valid: (B,) bool;
    totals: (2,) float32, images of each kind in the global batch.
    """
    kinds = (target * valid[:, None, None]).unflatten(0, (-1, 2)).transpose(0, 1).flatten(1, 2)
    sums = torch.cat([kinds.sum(dim=1, keepdim=True), kinds.transpose(1, 2) @ kinds], dim=1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.contiguous()
        dist.all_reduce(sums)
    tokens = totals.clamp(min=1.0) * target.shape[1]
    sums = sums / tokens[:, None, None]
    return Moments(sums[:, 0], sums[:, 1:])


def decorrelated_squares(
    prediction: Tensor, target: Tensor, correlation: Tensor, strength: float
) -> Tensor:
    """[|p - t|^2 + strength p' correlation p] / C of each token: (B, N) float32.

    prediction, target: (B, N, C) float32; correlation: (C, C) float32, or (B, C, C).
    """
    distance = (prediction - target).square().sum(dim=-1)
    similar = ((prediction @ correlation) * prediction).sum(dim=-1)
    return (distance + strength * similar) / prediction.shape[-1]


def target_deviation(moments: Moments, shares: Tensor) -> Tensor:
    """Standard deviation of the targets, mean over channels: 0-dim float32.

    shares: (2,) float32, parts of the two kinds of images.
    """
    return _covariance(moments, shares).diagonal().clamp(min=0.0).sqrt().mean().float()


def effective_rank(moments: Moments, shares: Tensor) -> Tensor:
    """In how many directions the targets differ: 0-dim float32, from 1 to the number of channels;
    nan if they are not finite.

    exp of the entropy of the singular values of the centred targets, divided by their sum (Roy and
    Vetterli, "The effective rank", 2007). Arguments as in `target_deviation`.
    """
    covariance = _covariance(moments, shares)
    if not covariance.isfinite().all():  # eigvalsh raises, where the step is to be skipped
        return covariance.new_full((), torch.nan).float()
    values = torch.linalg.eigvalsh(covariance).clamp(min=0.0).sqrt()
    parts = values / values.sum().clamp(min=1e-30)
    return torch.exp(-torch.xlogy(parts, parts).sum()).float()


def _covariance(moments: Moments, shares: Tensor) -> Tensor:
    mean = (shares[:, None] * moments.mean).sum(dim=0).double()
    second = (shares[:, None, None] * moments.correlation).sum(dim=0).double()
    return second - mean[:, None] * mean
