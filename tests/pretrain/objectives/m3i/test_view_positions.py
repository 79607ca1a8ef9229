"""Places of one view in another: SiameseIM's formula, a simulated image, and closed forms."""

import math

import cv2
import numpy as np
import pytest
import torch

from pretrain.objectives.m3i.view_positions import (
    grid_code,
    relative_positions,
    sine_code,
    target_code,
)

GRID = (7, 5)


def random_views(count: int, width: float = 200.0, height: float = 150.0):
    """Crops (count, 2, 4) inside of an image, and flips (count, 2)."""
    rng = np.random.default_rng(0)
    low, span = rng.random((count, 2, 2)), 0.1 + 0.8 * rng.random((count, 2, 2))
    low = low * (1 - span)
    crops = np.concatenate([low, low + span], axis=2) * [width, height, width, height]
    return torch.from_numpy(crops), torch.from_numpy(rng.random((count, 2)) < 0.5)


def siamese_places(crops, flips, grid, width):
    """As SiameseIM has it: the whole image is flipped first, crops are boxes of that image."""
    (x1a, y1a, x1b, y1b), (x2a, y2a, x2b, y2b) = crops.tolist()
    flip1, flip2 = flips.tolist()
    i1, h1, w1 = y1a, y1b - y1a, x1b - x1a
    i2, h2, w2 = y2a, y2b - y2a, x2b - x2a
    j1 = width - x1b if flip1 else x1a
    j2 = width - x2b if flip2 else x2a
    rows, columns = grid
    places = np.empty((rows, columns, 2))
    for r in range(rows):
        for c in range(columns):
            row = h2 / h1 * (r + 0.5) + (i2 - i1) / h1 * rows - 0.5
            if flip1 ^ flip2:
                column = -w2 / w1 * (c + 0.5) + (width - j1 - j2) / w1 * columns - 0.5
            else:
                column = w2 / w1 * (c + 0.5) + (j2 - j1) / w1 * columns - 0.5
            places[r, c] = row, column
    return places.reshape(-1, 2), (h2 / h1, w2 / w1)


def test_places_are_those_of_siamese_image_modelling():
    crops, flips = random_views(400)
    positions, scales = relative_positions(crops, flips, GRID)
    assert positions.dtype == scales.dtype == torch.float64
    for n in range(len(crops)):
        wanted, sizes = siamese_places(crops[n], flips[n], GRID, 200.0)
        np.testing.assert_allclose(positions[n], wanted, atol=2e-12)
        np.testing.assert_allclose(scales[n], sizes, rtol=1e-14)
    assert len({tuple(pair) for pair in flips.tolist()}) == 4


def test_a_pixel_of_the_upright_image_is_found_at_the_place():
    """Images whose colours are coordinates, really cropped, resized and flipped."""
    height, width, grid = 120, 160, (12, 12)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    image = np.stack([xs + 0.5, ys + 0.5], axis=2)
    crops = torch.tensor([[[10.0, 20, 106, 116], [30, 10, 102, 82]]], dtype=torch.float64)
    for flips in ([False, False], [True, False], [False, True], [True, True]):
        views = []
        for (x0, y0, x1, y1), flip in zip(crops[0].int().tolist(), flips, strict=True):
            view = cv2.resize(image[y0:y1, x0:x1], grid, interpolation=cv2.INTER_AREA)
            views.append(view[:, ::-1] if flip else view)
        positions, _ = relative_positions(crops, torch.tensor([flips]), grid)
        found = positions.view(*grid, 2).numpy()
        rows, columns = found[..., 0], found[..., 1]
        inside = (rows >= 0) & (rows <= 11) & (columns >= 0) & (columns <= 11)
        assert inside.sum() > 60
        sampled = cv2.remap(
            np.ascontiguousarray(views[0]),
            columns.astype(np.float32),
            rows.astype(np.float32),
            cv2.INTER_LINEAR,
        )
        assert np.abs(sampled - views[1])[inside].max() < 0.6  # pixels; remap counts in 1/32


def test_the_same_view_is_a_special_case():
    crops, flips = random_views(20)
    crops, flips = crops[:, :1].expand(-1, 2, -1), flips[:, :1].expand(-1, 2)
    positions, scales = relative_positions(crops, flips, GRID)
    wanted = torch.cartesian_prod(torch.arange(7), torch.arange(5)).double()
    torch.testing.assert_close(positions, wanted.expand(20, -1, -1), atol=1e-12, rtol=0)
    assert (scales == 1).all()
    code = target_code(positions, scales, 16)
    own = grid_code(GRID, 16, code.device)
    torch.testing.assert_close(code[..., :16], own.expand(20, -1, -1), atol=1e-6, rtol=0)
    unscaled = torch.tensor([0.0] * 4 + [1.0] * 4).repeat(2)
    torch.testing.assert_close(code[0, 0, 16:], unscaled)


def test_codes_in_closed_form():
    code = sine_code(torch.tensor([3.5]), 8)[0]
    angles = [3.5 * 10000 ** (-k / 4) for k in range(4)]
    wanted = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert code.tolist() == pytest.approx(wanted, abs=1e-7)
    own = grid_code((2, 3), 8, torch.device("cpu"))
    assert own.shape == (6, 8)
    torch.testing.assert_close(own[4], torch.cat([sine_code(torch.tensor(v), 4) for v in (1, 1)]))
    scaled = target_code(torch.zeros(1, 1, 2), torch.tensor([[2.0, 0.5]]), 8)[0, 0]
    for place, scale in ((8, 2.0), (12, 0.5)):
        wanted = sine_code(torch.tensor(10 * math.log(scale), dtype=torch.float64), 4)
        torch.testing.assert_close(scaled[place : place + 4], wanted)
