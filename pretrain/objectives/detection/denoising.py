"""Boxes with noise for the decoder to put right (DN-DETR, as in Mask DINO: positive noise only).

An image's known boxes come in as many groups as fit into a fixed number of queries, and its loss is
the mean over them. Mask DINO takes the number of groups from the fullest image of a rank's batch,
which makes the loss of an image depend on its neighbours; here it is the image's own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.models.host_numbers import on_device
from pretrain.models.regions.decoder import KnownBoxes
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.detection.matching import Pairs
from pretrain.objectives.detection.targets import Targets


class Denoising(NamedTuple):
    """Known boxes of a batch, and whose they are."""

    known: KnownBoxes
    pairs: Pairs
    """Each known box with its object."""
    weights: Tensor
    """(M,) float32: of each pair in the loss, 1 / groups of its image."""


def noisy_boxes(
    targets: Targets, draws: SampleDraws, queries: int = 100, noise: float = 0.4
) -> Denoising:
    """Known boxes for the objects of a batch, moved by the draws of their samples.

    Centres move by up to `noise` times half a side, sides change by up to `noise` times their
    length. Images with more than `queries` objects have none. There is always one query at least,
    so that the same modules run on every rank.
    """
    groups = [queries // count if count else 0 for count in targets.counts]
    counts = tuple(g * count for g, count in zip(groups, targets.counts, strict=True))
    longest = max(1, *counts)
    group = np.full((len(counts), longest), -1, dtype=np.int64)
    columns: list[np.ndarray] = [np.zeros((3, 0), dtype=np.int64)]
    start = 0
    for image, (count, total) in enumerate(zip(targets.counts, counts, strict=True)):
        slots = np.arange(total)
        group[image, :total] = slots // max(count, 1)
        columns.append(np.stack([np.full(total, image), slots, start + slots % max(count, 1)]))
        start += count
    device = targets.boxes.device
    images, slots, objects = torch.from_numpy(np.concatenate(columns, axis=1)).to(
        device, non_blocking=True
    )
    # The numbers of a slot do not depend on how many slots other images have.
    drawn = draws.uniform("denoising", 4 * longest).T.reshape(-1, 4)
    flat = images * longest + slots
    boxes = targets.boxes.index_select(0, objects)
    sides = boxes[:, 2:]
    change = (2 * drawn.index_select(0, flat).to(boxes.dtype) - 1) * noise
    moved = (boxes + change * torch.cat([sides / 2, sides], dim=1)).clamp(0, 1)
    known = torch.full((len(counts) * longest, 4), 0.5, dtype=boxes.dtype, device=device)
    known = known.index_copy(0, flat, moved).view(len(counts), longest, 4)
    parts = np.repeat([1 / max(g, 1) for g in groups], counts)
    return Denoising(
        known=KnownBoxes(known, torch.from_numpy(group).to(device, non_blocking=True)),
        pairs=Pairs(images, slots, objects, counts),
        weights=on_device(parts.tolist(), device).to(boxes.dtype),
    )
