"""Masks of pairs: a partition, keyed by the pair, the same in any micro-batch."""

import pytest
import torch

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.m3i.pair_masks import (
    gather_own,
    mix_pixels,
    on_grid,
    own_tokens,
    pair_masks,
)


def draws(positions, seed=0) -> SampleDraws:
    return SampleDraws(seed, "m3i", torch.as_tensor(positions))


@pytest.mark.parametrize("grid, share", [((4, 6), 12), ((7, 7), 25)])
def test_masks_partition_the_grid(grid, share):
    masks = pair_masks(draws(range(10)), grid)
    assert masks.shape == (5, *grid)
    assert (masks.flatten(1).sum(1) == share).all()
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 5
    own = own_tokens(masks, (2 * grid[0], 2 * grid[1]))
    assert (own[::2] ^ own[1::2]).all()


def test_masks_belong_to_pairs():
    all_masks = pair_masks(draws(range(12)), (4, 4))
    again = pair_masks(draws([8, 9, 2, 3]), (4, 4))
    assert torch.equal(again, all_masks[[4, 1]])
    swapped = pair_masks(draws([9, 8]), (4, 4))
    assert torch.equal(swapped, all_masks[[4]])
    assert not torch.equal(pair_masks(draws(range(12), seed=1), (4, 4)), all_masks)
    # Every cell is seen about as often in either image.
    many = pair_masks(draws(range(4000)), (4, 4)).float().mean(0)
    assert (many - 0.5).abs().max() < 0.05


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match=r"3 images cannot be mixed in pairs.*even micro-batch"):
        pair_masks(draws(range(3)), (4, 4))
    with pytest.raises(ValueError, match="even micro-batch"):
        mix_pixels(torch.zeros(3, 3, 8, 8), torch.zeros(1, 2, 2).bool())


def test_pixels_are_those_of_one_image_or_the_other():
    pixels = torch.randn(6, 3, 12, 8)
    masks = pair_masks(draws(range(6)), (3, 2))
    mixed = mix_pixels(pixels, masks)
    for pair in range(3):
        for row in range(3):
            for column in range(2):
                cell = (slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
                source = 2 * pair + (not masks[pair, row, column])
                assert torch.equal(mixed[pair][cell], pixels[source][cell])
    with pytest.raises(ValueError, match="does not divide"):
        on_grid(masks, (4, 4))


@pytest.mark.parametrize("cells, finer", [((2, 3), 2), ((3, 3), 2), ((4, 4), 1)])
def test_tokens_are_gathered_in_order(cells, finer):
    grid = (cells[0] * finer, cells[1] * finer)
    count = -(-cells[0] * cells[1] // 2) * finer**2
    own = own_tokens(pair_masks(draws(range(4)), cells), grid)
    tokens = torch.randn(2, grid[0] * grid[1], 5)
    chosen, places, present = gather_own(tokens, own, count)
    assert (present is None) == (cells[0] * cells[1] % 2 == 0)
    for row in range(4):
        wanted = own[row].nonzero()[:, 0]
        assert torch.equal(places[row, : len(wanted)], wanted)
        assert torch.equal(chosen[row, : len(wanted)], tokens[row // 2, wanted])
        if present is not None:
            assert present[row].tolist() == [True] * len(wanted) + [False] * (count - len(wanted))
