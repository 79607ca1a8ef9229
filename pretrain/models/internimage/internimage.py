"""InternImage (arXiv 2211.05778): a hierarchy of stages whose layers mix positions with DCNv3.

Its last map are its tokens; there are maps of all stages for dense tasks, and there may be a head
that makes one vector of an image. Parameter names are those of the official code.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.models.encoder import Encoded, Encoder, Grid, Output
from pretrain.models.host_numbers import on_device
from pretrain.models.internimage.channels_last import Conv, layer_norm
from pretrain.models.internimage.dcnv3 import DCNv3
from pretrain.models.internimage.heads import AttentionPool, ConvHead, PixelUp
from pretrain.models.internimage.layers import Layer, Stage, Stem
from pretrain.models.internimage.settings import (  # noqa: F401
    ConvHeadSettings,
    HeadSettings,
    InternImageSettings,
    ProjectorSettings,
)
from pretrain.models.sample_draws import SampleDraws

STAGES = 4
_POST_NORM_STAGE = 2


def _dcnv3(channels: int, groups: int, stage: int, layer: int) -> nn.Module:
    return DCNv3(channels, groups)


class InternImage(Encoder):
    """Stem, four stages, and perhaps a head.

    Arguments are the fields of `InternImageSettings`, but for `mixer`: (channels, groups, stage,
    layer of the stage) -> module that maps (B, H, W, channels) to the same shape.
    """

    def __init__(
        self,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mixer: Callable[[int, int, int, int], nn.Module] = _dcnv3,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        layer_scale: float | None = None,
        post_norm_layers: Sequence[int] = (),
        stage_norm: bool = True,
        head: ConvHeadSettings | ProjectorSettings | None = None,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(groups) == STAGES:
            raise ValueError(
                f"depths {tuple(depths)} and groups {tuple(groups)} must have one "
                f"number for each of the {STAGES} stages"
            )
        self.width = channels * 2 ** (STAGES - 1)
        self.depths = tuple(depths)
        self.gradient_checkpointing = gradient_checkpointing
        layers = sum(depths)
        # In plain Python: tensors would have no values on the meta device.
        self.drop_rates = [drop_path * n / max(1, layers - 1) for n in range(layers)]
        self.patch_embed = Stem(channels)
        self.levels = nn.ModuleList()
        for stage, depth in enumerate(depths):
            width = channels * 2**stage
            self.levels.append(
                Stage(
                    [
                        Layer(
                            width,
                            mixer(width, groups[stage], stage, layer),
                            mlp_ratio,
                            post_norm,
                            res_post_norm,
                            layer_scale,
                        )
                        for layer in range(depth)
                    ],
                    stage_norm,
                    tuple(post_norm_layers) if stage == _POST_NORM_STAGE else (),
                    downsample=stage < STAGES - 1,
                )
            )
        self.head = head
        self._add_head()

    def _add_head(self) -> None:
        """The head's modules are the encoder's own children, as their names want it."""
        if isinstance(self.head, ConvHeadSettings):
            self.conv_head = ConvHead(self.width)
        elif isinstance(self.head, ProjectorSettings):
            width = self.head.width
            self.dcnv3_head_x4 = nn.Sequential(Conv(self.width, 4 * width, 1), PixelUp())
            self.dcnv3_head_x3 = Conv(self.width // 2, width, 1)
            self.clip_projector = AttentionPool(width, self.head.heads, self.head.output)
            self.fc_norm = layer_norm(self.head.output)
        elif self.head is not None:
            raise TypeError(
                f"head {self.head!r} must be ConvHeadSettings(), ProjectorSettings() or None"
            )

    @property
    def pooled_width(self) -> int:
        """Width of the head's vector. Raises ValueError: there is no head."""
        if self.head is None:
            raise ValueError("this InternImage has no head; give it one (`head: {type: conv}`)")
        if isinstance(self.head, ConvHeadSettings):
            return self.conv_head.width
        return self.head.output

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """The last map as tokens (B, N, width), row by row.

        images: (B, 3, H, W) in `dtype`, of any size.
        draws: decide in training who skips which branch; none: torch's generator does.
        """
        (last,) = self._maps(images, draws, (STAGES - 1,), None)
        return last.flatten(1, 2)

    def encode(
        self,
        images: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """As `Encoder.encode`: the cells are the joined maps that a projector pools, and the maps
        those of all stages, (B, H_i, W_i, channels * 2**i).

        images: of any size for tokens and maps; for a projector multiples of 32.

        Raises:
            ValueError: groups, a head that is not there, or an image whose sides it cannot take.
        """
        if groups is not None:
            raise ValueError("convolutions cannot keep groups of tokens apart: set groups to None")
        self._require_heads(images, want)
        wanted = range(STAGES) if "maps" in want else (STAGES - 2, STAGES - 1)
        *finer, third, last = self._maps(images, draws, wanted, joined)
        cells = pooled = None
        if self.pools_cells and {"cells", "pooled"} & set(want):
            cells = (self.dcnv3_head_x4(last) + self.dcnv3_head_x3(third)).flatten(1, 2)
        if "pooled" in want:
            if self.pools_cells:
                pooled = self.normed(self.pool_cells(cells))
            else:
                pooled = self.conv_head(last, None if draws is None else draws.valid)
        return Encoded(
            tokens=last.flatten(1, 2) if "tokens" in want else None,
            cells=cells if "cells" in want else None,
            pooled=pooled,
            maps=[*finer, third, last] if "maps" in want else None,
        )

    def _require_heads(self, images: Tensor, want: Collection[Output]) -> None:
        """The heads that make what is wanted are there, and fit the images."""
        self.unwanted(want, ("tokens", "cells", "pooled", "maps"))
        if "pooled" in want:
            self.pooled_width  # noqa: B018 (raises where there is no head)
        if "cells" in want:
            self.grid("cells")
        height, width = images.shape[-2:]
        if self.pools_cells and {"cells", "pooled"} & set(want):
            third, last = (grid.sides(height, width) for grid in self.map_grids()[-2:])
            if third != (2 * last[0], 2 * last[1]):
                raise ValueError(
                    f"images of {height} x {width} pixels do not fit the projector that makes "
                    f"{self.pooled_width} values of them: use multiples of 32"
                )

    @property
    def pools_cells(self) -> bool:
        """Whether the head is a projector."""
        return isinstance(self.head, ProjectorSettings)

    def pool_cells(self, cells: Tensor, own: Tensor | None = None) -> Tensor:
        """As `Encoder.pool_cells`: the projector's attention pooling."""
        return self.clip_projector(cells, own)

    def normed(self, pooled: Tensor) -> Tensor:
        """As `Encoder.normed`."""
        return self.fc_norm(pooled)

    def pool_flops(self, cells: int) -> int:
        """As `Encoder.pool_flops`."""
        return self.clip_projector.flops(cells)

    def grid(self, of: Literal["stem", "cells"]) -> Grid:
        """The map behind the stem, or the joined maps. Raises ValueError: there is no projector."""
        if of == "stem":
            return Grid(self.width // 2 ** (STAGES - 1), 4, partial=True)
        if not self.pools_cells:
            raise ValueError(
                "dense features of an InternImage are the joined maps of its projector: give it "
                "one (`head: {type: projector}`)"
            )
        return Grid(self.head.width, 4 * 2 ** (STAGES - 2), partial=True)

    def map_grids(self) -> tuple[Grid, ...]:
        """One for each stage."""
        first = self.grid("stem").width
        return tuple(Grid(first * 2**i, 4 * 2**i, partial=True) for i in range(STAGES))

    def _maps(
        self,
        images: Tensor,
        draws: SampleDraws | None,
        stages: Sequence[int],
        joined: Tensor | None,
    ) -> list[Tensor]:
        """The maps of some stages, in their order; nothing behind the last of them is computed."""
        kept = self._kept(images, draws)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        if joined is not None:
            x = x + joined
        found: list[Tensor] = []
        first = 0
        for index, (stage, depth) in enumerate(zip(self.levels, self.depths, strict=True)):
            x = stage(x, None if kept is None else kept[first : first + depth], recompute)
            first += depth
            if index in stages:
                found.append(x)
            if index == max(stages):
                break
            x = stage.downsample(x)
        return found

    def _kept(self, images: Tensor, draws: SampleDraws | None) -> Tensor | None:
        """Factors (layers, 2, B) of the branches of each sample, or none where all are 1."""
        if not self.training or not any(self.drop_rates):
            return None
        layers, batch = len(self.drop_rates), len(images)
        if draws is None:
            uniform = torch.rand(2 * layers, batch, device=images.device)
        else:
            uniform = draws.uniform("drop_path", 2 * layers)
        rates = on_device(self.drop_rates, images.device)[:, None, None]
        kept = (uniform.view(layers, 2, batch) >= rates) / (1 - rates)
        return kept.to(images.dtype)

    def layer_names(self) -> list[tuple[str, ...]]:
        """Names of the submodules of each layer, from the input on, as the official code groups
        them: what stands between two stages belongs to the next layer, and heads to the last."""
        blocks = [
            f"levels.{stage}.blocks.{layer}"
            for stage, depth in enumerate(self.depths)
            for layer in range(depth)
        ]
        names = [[block] for block in blocks]
        names[0].append("patch_embed")
        for stage in range(STAGES - 1):
            following = names[sum(self.depths[: stage + 1])]
            following += [f"levels.{stage}.norm", f"levels.{stage}.downsample"]
        heads = ("conv_head", "dcnv3_head_x3", "dcnv3_head_x4", "clip_projector", "fc_norm")
        names[-1] += [f"levels.{STAGES - 1}.norm", f"levels.{_POST_NORM_STAGE}.post_norms", *heads]
        return [tuple(layer) for layer in names]

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens for an image of `height` x `width` pixels."""
        rows, columns = _sizes(height, width)[-1]
        return rows * columns

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`: matrix products, convolutions, and the four multiply-adds of each
        sampled point and channel."""
        half, *sizes = _sizes(height, width)
        areas = [rows * columns for rows, columns in sizes]
        total = self.patch_embed.flops(half[0] * half[1], areas[0])
        for stage, size, after in zip(self.levels, sizes, [*areas[1:], 0], strict=True):
            total += stage.flops(*size)
            if stage.downsample is not None:
                total += stage.downsample.conv.flops(after)
        if want == "pooled" and not self.pools_cells:
            return total + self.conv_head.flops(areas[-1])
        if want in ("cells", "pooled"):
            # The last map is brought to the grid of the third, which is twice as fine.
            total += self.dcnv3_head_x4[0].flops(areas[-1])
            total += self.dcnv3_head_x3.flops(4 * areas[-1])
        return total + (self.pool_flops(areas[-2]) if want == "pooled" else 0)


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sides of the maps behind each halving: one in the stem, then those of the stages."""
    sizes = []
    for _ in range(STAGES + 1):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes
