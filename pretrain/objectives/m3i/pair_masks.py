"""Two images in one: complementary masks of pairs of neighbours (M3I, arXiv 2211.09807, figure 1).

Partners are the rows 2i and 2i + 1 of a micro-batch, positions P and P xor 1. A mask over square
cells says which of the first image's cells are seen; the others are the second one's.
"""

import torch
from torch import Tensor

from pretrain.models.sample_draws import SampleDraws


def check_pairs(rows: int) -> None:
    """Raise ValueError for a batch in which some image has no partner."""
    if rows % 2:
        raise ValueError(
            f"{rows} images cannot be mixed in pairs: M3I needs an even micro-batch, in which "
            "positions P and P xor 1 stay together"
        )


def pair_masks(draws: SampleDraws, grid: tuple[int, int]) -> Tensor:
    """Cells of each pair that the first image has: half of them, the larger half if they are odd.

    draws: of the B rows of the micro-batch; the masks of a pair depend on the even position alone.
    grid: rows and columns of cells. Returns (B / 2, rows, columns) bool.
    """
    check_pairs(len(draws.positions))
    first = SampleDraws(draws.seed, draws.task, draws.positions[::2] & ~1)
    cells = grid[0] * grid[1]
    order = first.uniform("m3i mask", cells).T.argsort(dim=1)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    mask.scatter_(1, order[:, : -(-cells // 2)], True)
    return mask.view(-1, *grid)


def on_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """`masks` (P, rows, columns) on a finer grid, whose sides are multiples: (P, *grid)."""
    _, rows, columns = masks.shape
    if grid[0] % rows or grid[1] % columns:
        raise ValueError(f"a grid of {grid} does not divide into {(rows, columns)} cells")
    fine = masks.repeat_interleave(grid[0] // rows, dim=1)
    return fine.repeat_interleave(grid[1] // columns, dim=2)


def mix_pixels(pixels: Tensor, masks: Tensor) -> Tensor:
    """One image of two: (B / 2, C, H, W) of pixels (B, C, H, W), by masks (B / 2, rows, columns),
    whose cells divide the image."""
    check_pairs(len(pixels))
    first, second = pixels.unflatten(0, (-1, 2)).unbind(1)
    return torch.where(on_grid(masks, pixels.shape[-2:])[:, None], first, second)


def own_tokens(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens of a mixed image that belong to each of its two: (B, rows * columns) bool."""
    fine = on_grid(masks, grid).flatten(1)
    return torch.stack([fine, ~fine], dim=1).flatten(0, 1)


def gather_own(tokens: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each image of a pair the tokens that are its own, out of those of the mixed image.

    tokens: (P, N, D) of the mixed images; own: (2 P, N) bool, at most `count` of each row.
    Returns (2 P, count, D); their places (2 P, count) int64, ascending; and where rows have fewer,
    which ones are there (2 P, count) bool, else None.
    """
    places = (~own).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    both = tokens.repeat_interleave(2, dim=0)
    chosen = both.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[-1]))
    # Of an even number of cells both images have the half, and no mask is needed.
    whole = 2 * count == own.shape[1]
    return chosen, places, None if whole else own.gather(1, places)
