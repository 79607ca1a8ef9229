"""Rows of all ranks on every rank, with the gradient that they deserve.

The usual gather without gradient leaves out what the other ranks' losses say about this rank's
rows: features then get a part of their gradient, a temperature gets all of it, and the two no
longer fit together.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Join equally many rows of every rank, in rank order; a collective, in backward too.

    rows: (n, ...) of the same shape on every rank. Returns (world * n, ...). The gradient of this
    rank's rows is the sum, over all ranks, of what each rank's loss says about them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        ctx.rows = len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # An all-reduce and a slice: gloo has no reduce-scatter, and features are small.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]
