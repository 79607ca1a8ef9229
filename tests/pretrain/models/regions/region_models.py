"""A small proposal network, maps for it, and batches of box data."""

import torch
from torch import Tensor

from pretrain.models.init import initialise
from pretrain.models.regions.proposals import RegionProposals
from pretrain.models.regions.settings import RegionSettings

CANVAS = (64, 96)
CHANNELS = (16, 24, 32, 48)
SMALL = {
    "width": 32,
    "heads": 2,
    "points": 2,
    "encoder_layers": 2,
    "encoder_hidden": 48,
    "decoder_layers": 3,
    "decoder_hidden": 48,
    "queries": 12,
    "kept": 8,
    "token_width": 40,
    "attention_pools": 2,
    "pool_heads": 2,
}


def small_regions(seed: int = 0, **changes) -> RegionProposals:
    model = RegionSettings(**(SMALL | changes)).over(CHANNELS)
    initialise(model, seed)
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Leave the first values, many of which are zeros that hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def maps_of(batch: int, seed: int = 1) -> list[Tensor]:
    """Maps of strides 4 to 32 of a canvas of 64 x 96."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, CANVAS[0] // stride, CANVAS[1] // stride, count, generator=generator)
        for stride, count in zip((4, 8, 16, 32), CHANNELS, strict=True)
    ]


def box_batch(counts: list[int], crowds: list[int] | None = None, seed: int = 2) -> dict:
    """Box data with masks as `BoxProcessor.collate` gives it; the last boxes are the crowds."""
    generator = torch.Generator().manual_seed(seed)
    batch, most = len(counts), max(counts)
    height, width = CANVAS
    boxes = torch.zeros(batch, most, 4)
    labels = torch.full((batch, most), -1)
    crowd = torch.zeros(batch, most, dtype=torch.bool)
    masks = torch.zeros(sum(counts), height, width, dtype=torch.bool)
    row = 0
    for image, count in enumerate(counts):
        for place in range(count):
            low = torch.rand(2, generator=generator) * 0.6
            side = 0.1 + 0.3 * torch.rand(2, generator=generator)
            x0, y0 = (low * torch.tensor([width, height])).tolist()
            w, h = (side * torch.tensor([width, height])).tolist()
            boxes[image, place] = torch.tensor([x0, y0, x0 + w, y0 + h])
            labels[image, place] = int(torch.randint(5, (1,), generator=generator))
            masks[row, round(y0) : round(y0 + h), round(x0) : round(x0 + w)] = True
            row += 1
        if crowds:
            crowd[image, count - crowds[image] : count] = True
    return {
        "images": torch.zeros(batch, 3, height, width, dtype=torch.uint8),
        "boxes": boxes,
        "labels": labels,
        "crowd": crowd,
        "masks": masks,
        "counts": torch.tensor(counts),
        "annotated": torch.ones(batch, dtype=torch.bool),
        "valid": torch.ones(batch, dtype=torch.bool),
    }
