"""Points of masks, and what is read there."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.detection.points import draw_points, features_at, masks_at


@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_samples_are_those_of_torch(spread):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 7, 3, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 9, 6, generator=generator) > 0.5
    points = torch.rand(2, 50, 2, generator=generator, dtype=torch.float64)
    points = spread * (points - 0.5) + 0.5  # some outside
    grid = 2 * points[:, None] - 1
    right = F.grid_sample(features.permute(0, 3, 1, 2), grid, align_corners=False)[:, :, 0]
    torch.testing.assert_close(features_at(features, points), right.transpose(1, 2))
    right = F.grid_sample(masks[:, None].double(), grid, align_corners=False)[:, 0, 0]
    torch.testing.assert_close(masks_at(masks, points), right)
    assert masks_at(masks[:0], points[:0]).shape == (0, 50)


def test_points_belong_to_the_sample():
    both = draw_points(SampleDraws(1, "detect", torch.tensor([4, 9])), 64)
    alone = draw_points(SampleDraws(1, "detect", torch.tensor([9])), 64)
    assert both.matching.shape == (2, 64, 2) and both.candidates.shape == (2, 192, 2)
    assert both.free.shape == (2, 16, 2) and both.uncertain == 48
    for first, second in zip(both[:3], alone[:3], strict=True):
        assert torch.equal(first[1:], second) and not torch.equal(first[0], first[1])
        assert first.min() >= 0 and first.max() < 1
    many = draw_points(SampleDraws(1, "detect", torch.tensor([0])), 20_000).candidates[0]
    assert many.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert many.std(0).tolist() == pytest.approx([12**-0.5] * 2, abs=0.01)
