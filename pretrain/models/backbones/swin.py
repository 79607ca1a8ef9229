"""Swin transformer: transformers' SwinBackbone as an encoder (arXiv 2103.14030)."""

from pathlib import Path

from torch import Tensor
from transformers import SwinBackbone, SwinConfig

from pretrain.models.backbones.maps import STAGES, MapBackbone, loaded
from pretrain.models.backbones.settings import (
    SwinSettings,
)
from pretrain.models.encoder import Output
from pretrain.models.init import DEFAULT_STD


class Swin(MapBackbone):
    """Four stages of shifted windows. Arguments are the fields of `SwinSettings`."""

    def __init__(
        self,
        channels: int = 128,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        heads: tuple[int, ...] = (4, 8, 16, 32),
        window: int = 12,
        gradient_checkpointing: bool = False,
    ) -> None:
        config = SwinConfig(
            embed_dim=channels,
            depths=list(depths),
            num_heads=list(heads),
            window_size=window,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
            out_features=STAGES,
        )
        backbone = SwinBackbone(config)
        super().__init__(backbone, tuple(channels * 2**stage for stage in range(4)))
        self.depths, self.window = tuple(depths), window
        table = "relative_position_bias_table"
        for module in backbone.modules():
            if table in module._parameters:
                module.initial_std = {table: DEFAULT_STD}
        if gradient_checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`; what halves a map belongs to the block before it."""
        layers = [("backbone.swin.embeddings",)]
        for stage, depth in enumerate(self.depths):
            prefix = f"backbone.swin.encoder.layers.{stage}"
            layers += [(f"{prefix}.blocks.{block}",) for block in range(depth)]
            layers[-1] = (*layers[-1], f"{prefix}.downsample")
        return [*layers, ("backbone.swin.layernorm", "backbone.hidden_states_norms")]

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`, matrix products only."""
        grids = self.map_grids()
        places = [rows * columns for rows, columns in (g.sides(height, width) for g in grids)]
        total = 2 * places[0] * 3 * 4 * 4 * self.channels[0]
        for stage, (depth, count, wide) in enumerate(
            zip(self.depths, places, self.channels, strict=True)
        ):
            block = 2 * count * 12 * wide**2 + 4 * count * self.window**2 * wide
            merging = 2 * places[stage + 1] * 8 * wide**2 if stage < 3 else 0
            total += depth * block + merging
        return total


def load_folder(folder: Path) -> tuple[SwinSettings, dict[str, Tensor]]:
    """Settings and tensors, under our names, of a local folder of transformers.

    Raises ValueError: as `maps.loaded`, or a shape that ours has not.
    """
    model = loaded(SwinBackbone, folder, ("hidden_states_norms.", "swin.layernorm."))
    config = model.config
    fixed = {
        "patch_size": 4,
        "num_channels": 3,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
    }
    if other := {n: getattr(config, n) for n, v in fixed.items() if getattr(config, n) != v}:
        raise ValueError(f"{folder}: a Swin with {other} is not known here, only with {fixed}")
    settings = SwinSettings(
        channels=config.embed_dim,
        depths=config.depths,
        heads=config.num_heads,
        window=config.window_size,
    )
    return settings, {f"backbone.{name}": p.data for name, p in model.named_parameters()}
