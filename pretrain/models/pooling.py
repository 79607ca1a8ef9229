"""From the tokens of an image or a text to one vector."""

from torch import Tensor


def masked_mean(tokens: Tensor, own: Tensor | None) -> Tensor:
    """Mean of the tokens that count, (B, width).

    tokens: (B, N, width); own: (B, N) bool, the tokens that count, at least one in each row; none:
    all.
    """
    if own is None:
        return tokens.mean(dim=1)
    summed = (own.to(tokens.dtype)[:, None] @ tokens)[:, 0]
    return summed / own.sum(dim=1, keepdim=True).to(tokens.dtype)
