"""ResNet: transformers' ResNetBackbone as an encoder, with batch norms that are frozen."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ResNetBackbone, ResNetConfig

from pretrain.models.backbones.maps import STAGES, MapBackbone, loaded
from pretrain.models.backbones.settings import (
    ResNetSettings,
)
from pretrain.models.encoder import Output


class FrozenNorm(nn.Module):
    """A batch norm whose statistics and factors are kept as they are, under their usual names."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, maps: Tensor) -> Tensor:
        """maps: (B, C, H, W). Returns the same shape and type."""
        # In float32: a variance in bfloat16 would be off by up to 0.4 percent.
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        shift = self.bias.float() - self.running_mean.float() * scale
        scale, shift = (one[:, None, None].to(maps.dtype) for one in (scale, shift))
        return maps * scale + shift


class ResNet(MapBackbone):
    """A stem and four stages of bottlenecks. Arguments are the fields of `ResNetSettings`."""

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        channels: tuple[int, ...] = (256, 512, 1024, 2048),
        stem: int = 64,
        stride_in_first: bool = False,
    ) -> None:
        config = ResNetConfig(
            embedding_size=stem,
            hidden_sizes=list(channels),
            depths=list(depths),
            downsample_in_bottleneck=stride_in_first,
            out_features=STAGES,
        )
        backbone = ResNetBackbone(config)
        super().__init__(backbone, tuple(channels))
        self.depths, self.stem = tuple(depths), stem
        freeze_norms(backbone)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                module.initial_std = {"weight": (2 / fan_out) ** 0.5}

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`."""
        return [
            ("backbone.embedder",),
            *(
                (f"backbone.encoder.stages.{stage}.layers.{number}",)
                for stage, depth in enumerate(self.depths)
                for number in range(depth)
            ),
        ]

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`; strides are taken to be in the second convolution."""
        grids = self.map_grids()
        places = [rows * columns for rows, columns in (g.sides(height, width) for g in grids)]
        total = 2 * 4 * places[0] * 3 * 7 * 7 * self.stem
        before = self.stem
        for stage, (depth, count, wide) in enumerate(
            zip(self.depths, places, self.channels, strict=True)
        ):
            inner = wide // 4
            entered = places[max(stage - 1, 0)]
            first = entered * before * inner + count * (9 * inner**2 + inner * wide + before * wide)
            others = count * (2 * inner * wide + 9 * inner**2)
            total += 2 * (first + (depth - 1) * others)
            before = wide
        return total


def freeze_norms(module: nn.Module) -> None:
    """Put a `FrozenNorm` with the same values in the place of every batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenNorm(child.num_features, child.eps)
            state = {n: t for n, t in child.state_dict().items() if n != "num_batches_tracked"}
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def load_folder(folder: Path) -> tuple[ResNetSettings, dict[str, Tensor]]:
    """Settings and tensors, statistics of the norms among them, under our names, of a local folder
    of transformers.

    Raises ValueError: as `maps.loaded`, or a shape that ours has not.
    """
    model = loaded(ResNetBackbone, folder, ())
    config = model.config
    fixed = {
        "layer_type": "bottleneck",
        "num_channels": 3,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
    }
    if other := {n: getattr(config, n) for n, v in fixed.items() if getattr(config, n) != v}:
        raise ValueError(f"{folder}: a ResNet with {other} is not known here, only with {fixed}")
    settings = ResNetSettings(
        depths=config.depths,
        channels=config.hidden_sizes,
        stem=config.embedding_size,
        stride_in_first=config.downsample_in_bottleneck,
    )
    freeze_norms(model)
    return settings, {f"backbone.{name}": t for name, t in model.state_dict().items()}
