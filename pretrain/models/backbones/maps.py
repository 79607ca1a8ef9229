"""What the backbones of transformers have in common: four maps, of strides 4 to 32."""

import json
from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from pretrain.models.encoder import Encoded, Encoder, Grid, Output
from pretrain.models.sample_draws import SampleDraws

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class MapBackbone(Encoder):
    """A backbone of transformers as an encoder; its tokens are the places of the last map.

    Args:
        backbone: gives `feature_maps` (B, C, H, W) of `STAGES`.
        channels: of each map.
    """

    def __init__(self, backbone: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.width = channels[-1]

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Places of the last map, row by row: (B, N, width). Nothing is drawn."""
        return self.maps(images)[-1].flatten(1, 2)

    def encode(
        self,
        images: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """As `Encoder.encode`."""
        self.unwanted(want, ("tokens", "maps"))
        if joined is not None or groups is not None:
            raise ValueError(f"{type(self).__name__} joins nothing, and has no groups")
        maps = self.maps(images)
        return Encoded(
            tokens=maps[-1].flatten(1, 2) if "tokens" in want else None,
            maps=maps if "maps" in want else None,
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, H_i, W_i, channels[i]) of images (B, 3, H, W), the finest first."""
        found = self.backbone(images).feature_maps
        return [one.permute(0, 2, 3, 1).contiguous() for one in found]

    def map_grids(self) -> tuple[Grid, ...]:
        """Strides 4, 8, 16 and 32; what sticks out of the image counts."""
        return tuple(Grid(c, 4 * 2**i, partial=True) for i, c in enumerate(self.channels))


def loaded(kind: type[nn.Module], folder: Path, may_miss: tuple[str, ...]) -> nn.Module:
    """A backbone of a local folder of transformers: of a backbone, or of a model around one.

    kind: SwinBackbone or ResNetBackbone. may_miss: beginnings of names that models have not.

    Raises ValueError: no such folder, another model, or tensors are missing or unknown.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a transformers model")
    expected = kind.config_class.model_type
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        if config.to_dict().get("model_type") != expected or _model_type(folder) != expected:
            raise ValueError(f"it is a {_model_type(folder)}, and not a {expected}")
        config.out_features = STAGES
        model, report = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(may_miss))
    unknown = sorted(
        n for n in report["unexpected_keys"] if not n.startswith(("classifier.", "pooler."))
    )
    if wrong := missing + unknown + sorted(map(str, report["mismatched_keys"])):
        raise ValueError(f"{folder}: tensors are missing, unknown, or of other shapes: {wrong[:5]}")
    return model


def _model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "?")
