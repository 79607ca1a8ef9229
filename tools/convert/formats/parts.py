"""What the writers of all formats share: the export that is being made, and files of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.images.transforms import ImageSettings
from pretrain.models.pixels import normalise_pixels
from pretrain.models.vit_settings import VitSettings
from tools.convert.formats.listing import Choice
from tools.support.trained import TrainedRun

IMAGES = 8
"""Random images by which a written file is compared with ours."""


@dataclass
class Export:
    """What is to be written, and what has been found out about it."""

    run: TrainedRun
    choice: Choice
    vit: VitSettings
    tensors: dict[str, Tensor]
    """Our names -> tensors, the position table of the size of the images."""
    image: ImageSettings
    notes: list[str] = field(default_factory=list)
    """What differs from training."""
    differences: dict[str, float] = field(default_factory=dict)
    """Kind of output -> largest difference from ours, as a part of the largest value."""

    def images(self) -> Tensor:
        """Seeded random images (B, 3, S, S) uint8."""
        shape = (IMAGES, 3, self.image.size, self.image.size)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def pixels(self) -> Tensor:
        """They, normalised."""
        return normalise_pixels(self.images(), self.image.mean, self.image.std, torch.float32)

    def compare(self, kind: str, theirs: Tensor, ours: Tensor) -> None:
        """Note how far they are apart; what is no number is infinitely far."""
        gap = ((theirs - ours).abs().max() / ours.abs().max()).item()
        self.differences[kind] = gap if math.isfinite(gap) else math.inf


def of(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Those whose names begin so."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(start)}


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A .safetensors file, as transformers and timm want it."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def write_json(path: Path, content: Any) -> None:
    """A configuration."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
