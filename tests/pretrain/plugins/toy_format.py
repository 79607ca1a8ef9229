"""A whole downstream format in one file: names of somebody else's model for the toy encoder and
what reads it, and that model, which proves them."""

import torch
from torch import Tensor, nn

from pretrain.models.key_map import KeyMap

# The linear layer of patches is kept in two halves there.
RULES = (
    ("<E>.image.patches.{p}", ("stem.upper.{p}", "stem.lower.{p}")),
    ("<E>.image.norm.{p}", "stem.norm.{p}"),
    ("<E>.refiner.inner.{p}", "mlp.0.{p}"),
    ("<E>.refiner.outer.{p}", "mlp.2.{p}"),
)

TOY_FORMAT = KeyMap(RULES, {"E": "encoders"}, model="toy", theirs="their")


class TheirModel(nn.Module):
    def __init__(self, width: int = 16, patch: int = 8) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "upper": nn.Conv2d(3, width // 2, patch, patch),
                "lower": nn.Conv2d(3, width // 2, patch, patch),
                "norm": nn.LayerNorm(width),
            }
        )
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised. Returns (B, N, width)."""
        halves = [self.stem[name](images) for name in ("upper", "lower")]
        tokens = self.stem["norm"](torch.cat(halves, dim=1).flatten(2).transpose(1, 2))
        return tokens + self.mlp(tokens)
