"""InternImage (arXiv 2211.05778): a hierarchy of stages whose layers mix positions with DCNv3.

Offers what any image encoder of the project does (see `vit.py`), its last map as tokens; besides
`maps()` of all stages for dense tasks, and a head that makes one vector of an image. Parameter
names are those of the official code.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pretrain.models.channels_last import Conv, layer_norm
from pretrain.models.dcnv3 import DCNv3
from pretrain.models.host_numbers import on_device
from pretrain.models.internimage_heads import AttentionPool, ConvHead, PixelUp
from pretrain.models.internimage_layers import Layer, Stage, Stem
from pretrain.models.internimage_settings import (  # noqa: F401
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


class InternImage(nn.Module):
    """Stem, four stages, and perhaps a head.

    Arguments are the fields of `InternImageSettings`, but for `mixer`: (channels, groups, stage,
    layer of the stage) -> module that maps (B, H, W, channels) to the same shape.
    """

    takes_draws = True

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
            raise ValueError(f"depths {tuple(depths)} and groups {tuple(groups)} must have one "
                             f"number for each of the {STAGES} stages")
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
                            width, mixer(width, groups[stage], stage, layer), mlp_ratio, post_norm,
                            res_post_norm, layer_scale,
                        )
                        for layer in range(depth)
                    ],
                    stage_norm,
                    tuple(post_norm_layers) if stage == _POST_NORM_STAGE else (),
                    downsample=stage < STAGES - 1,
                )
            )  # fmt: skip
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
            raise TypeError(f"head {self.head!r} must be ConvHeadSettings(), ProjectorSettings() "
                            "or None")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type that `forward` expects of its images."""
        return self.patch_embed.conv1.weight.dtype

    @property
    def pooled_width(self) -> int:
        """Width of the head's vector. Raises ValueError: there is no head."""
        if self.head is None:
            raise ValueError("this InternImage has no head; give it one (`head: {type: conv}`)")
        if isinstance(self.head, ConvHeadSettings):
            return self.conv_head.width
        return self.head.output

    def forward(
        self, images: Tensor, draws: SampleDraws | None = None, pooled: bool = False
    ) -> Tensor:
        """Encode normalised images.

        images: (B, 3, H, W) in `dtype`, of any size.
        draws: decide in training who skips which branch; none: torch's generator does.
        pooled: whether the head's vector is wanted.

        Returns the last map as tokens (B, N, width), row by row, or with `pooled` (B,
        pooled_width).

        Raises:
            ValueError: a head that is not there, or an image whose sides it cannot take.
        """
        if not pooled:
            (last,) = self.maps(images, draws, out_indices=(STAGES - 1,))
            return last.flatten(1, 2)
        width = self.pooled_width
        third, last = self.maps(images, draws, out_indices=(STAGES - 2, STAGES - 1))
        if isinstance(self.head, ConvHeadSettings):
            return self.conv_head(last, None if draws is None else draws.valid)
        if third.shape[1:3] != (2 * last.shape[1], 2 * last.shape[2]):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels do not fit the "
                f"projector that makes {width} values of them: use multiples of 32"
            )
        return self.fc_norm(self.clip_projector(self._joined(third, last)))

    def _joined(self, third: Tensor, last: Tensor) -> Tensor:
        """The last two maps as one, on the grid of the third: (B, N, head.width)."""
        return (self.dcnv3_head_x4(last) + self.dcnv3_head_x3(third)).flatten(1, 2)

    @property
    def dense_width(self) -> int:
        """Channels of `dense`. Raises ValueError: the head is no projector."""
        if not isinstance(self.head, ProjectorSettings):
            raise ValueError(
                "dense features of an InternImage are the joined maps of its projector: give it "
                "one (`head: {type: projector}`)"
            )
        return self.head.width

    @property
    def stem_width(self) -> int:
        """Channels of what `dense` lets join."""
        return self.width // 2 ** (STAGES - 1)

    def stem_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what `dense` lets join."""
        return _sizes(height, width)[1]

    def dense_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of `dense`."""
        return _sizes(height, width)[STAGES - 1]

    def dense(
        self,
        images: Tensor,
        draws: SampleDraws | None = None,
        added: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """The joined maps of the projector, for dense tasks: (B, N, dense_width), row by row.

        images: (B, 3, H, W) in `dtype`, sides multiples of 32; draws, added: as in `maps`.
        groups: for encoders with attention; must be None.

        Raises:
            ValueError: groups, or a head that is no projector.
        """
        if groups is not None or self.dense_width < 1:
            raise ValueError("convolutions cannot keep groups of tokens apart: set groups to None")
        third, last = self.maps(images, draws, (STAGES - 2, STAGES - 1), added)
        return self._joined(third, last)

    def dense_flops(self, height: int, width: int) -> int:
        """Floating-point operations of `dense` for one image."""
        tokens = self.tokens(height, width)
        joined = self.dcnv3_head_x4[0].flops(tokens) + self.dcnv3_head_x3.flops(4 * tokens)
        return self.flops(height, width) + joined

    def maps(
        self,
        images: Tensor,
        draws: SampleDraws | None = None,
        out_indices: Sequence[int] = tuple(range(STAGES)),
        added: Tensor | None = None,
    ) -> list[Tensor]:
        """The maps of some stages, for dense tasks: (B, H_i, W_i, channels * 2**i), channels-last.

        images, draws: as in `forward`. Sides are those of the image over 4 * 2**i, rounded up.
        out_indices: stages from 0; maps come in the order of stages.
        added: (B, H_0, W_0, channels), joins what the stem makes.

        Raises ValueError: a stage that there is not, or none.
        """
        if not out_indices or not set(out_indices) <= set(range(STAGES)):
            raise ValueError(f"out_indices {tuple(out_indices)} must be among the stages 0 to "
                             f"{STAGES - 1}")
        kept = self._kept(images, draws)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        if added is not None:
            x = x + added
        found: list[Tensor] = []
        first = 0
        for index, (stage, depth) in enumerate(zip(self.levels, self.depths, strict=True)):
            x = stage(x, None if kept is None else kept[first : first + depth], recompute)
            first += depth
            if index in out_indices:
                found.append(x)
            if index == max(out_indices):
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

    def flops(self, height: int, width: int, pooled: bool = False) -> int:
        """Floating-point operations of one forward pass over one image: matrix products,
        convolutions, and the four multiply-adds of each sampled point and channel.

        pooled: with the head.
        """
        half, *sizes = _sizes(height, width)
        areas = [rows * columns for rows, columns in sizes]
        total = self.patch_embed.flops(half[0] * half[1], areas[0])
        for stage, size, after in zip(self.levels, sizes, [*areas[1:], 0], strict=True):
            total += stage.flops(*size)
            if stage.downsample is not None:
                total += stage.downsample.conv.flops(after)
        if pooled and isinstance(self.head, ConvHeadSettings):
            total += self.conv_head.flops(areas[-1])
        elif pooled:
            return self.dense_flops(height, width) + self.clip_projector.flops(areas[-2])
        return total


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sides of the maps behind each halving: one in the stem, then those of the stages."""
    sizes = []
    for _ in range(STAGES + 1):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes
