"""InternImage (arXiv 2211.05778): a hierarchy of stages whose layers mix positions with DCNv3.

Offers what any image encoder of the project does (see `vit.py`), its last map as tokens; besides
`maps()` of all stages for dense tasks, and a head that makes one vector of an image. Parameter
names are those of the official code.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.settings import Settings
from pretrain.models.channels_last import Conv, layer_norm
from pretrain.models.dcnv3 import DCNv3
from pretrain.models.host_numbers import on_device
from pretrain.models.internimage_heads import AttentionPool, ConvHead, PixelUp
from pretrain.models.internimage_layers import Layer, Stage, Stem
from pretrain.models.internimage_sizes import SIZES
from pretrain.models.mixer_settings import ByStage, DCNv3Settings, MixerSettings
from pretrain.models.sample_draws import SampleDraws

STAGES = 4
_POST_NORM_STAGE = 2


class ConvHeadSettings(Settings):
    """1x1 convolution, batch norm, GELU and mean over the last map: 12 x `channels` wide.

    Batch norm couples the samples of a micro-step, over all ranks: another `micro_batch` gives
    slightly other gradients."""

    type: Literal["conv"] = "conv"
    """Selects this head."""


class ProjectorSettings(Settings):
    """Attention pooling of the last two maps (the image projector of M3I); sides of images must be
    multiples of 32."""

    type: Literal["projector"] = "projector"
    """Selects this head."""
    width: int = Field(1024, gt=0)
    """Channels of the joined maps."""
    heads: int = Field(16, gt=0)
    """Attention heads; must divide `width`."""
    output: int = Field(768, gt=0)
    """Width of the vector."""

    @model_validator(mode="after")
    def _check(self) -> "ProjectorSettings":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


HeadSettings = Annotated[ConvHeadSettings | ProjectorSettings, Field(discriminator="type")]


class InternImageSettings(Settings):
    """Shape of an InternImage; `size` fills in a published one."""

    reads: ClassVar[str] = "images"
    type: Literal["internimage"] = "internimage"
    """Selects this encoder among the kinds that a recipe may name."""
    size: Literal["T", "S", "B", "L", "XL", "H", "G"] | None = None
    """A published model, whose values the fields below then have unless they are given too."""
    channels: int = Field(64, gt=0)
    """Channels of the first stage; each stage has twice those of the one before."""
    depths: ByStage = Field([4, 4, 18, 4])
    """Layers of each stage."""
    groups: ByStage = Field([4, 8, 16, 32])
    """Groups of DCNv3 (attention heads of other mixers) in each stage."""
    mixer: MixerSettings = DCNv3Settings()
    """What mixes positions; the block around it is the same for all kinds."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLP, as a multiple of the stage's."""
    post_norm: bool = False
    """Norms behind mixer and MLP instead of before them."""
    res_post_norm: bool = False
    """Norms behind mixer and MLP besides those before them."""
    layer_scale: float | None = Field(None, allow_inf_nan=False)
    """First value of learned factors on what a layer adds to each channel; null = no factors."""
    post_norm_layers: list[int] = Field([])
    """Layers of the third stage, from 0, behind which the residual stream is normalised."""
    stage_norm: bool = True
    """A norm at the end of each stage."""
    head: HeadSettings | None = None
    """Makes one vector of an image, for objectives with `pool: head`; null = none."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Chance that a sample skips a branch of the last layer; it rises from 0 in the first one."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: about a third more time for far less memory."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        mixer = data.get("mixer")
        if isinstance(mixer, dict):
            mixer = {"type": "dcnv3", **mixer}
        known = SIZES.get(data.get("size"), {}) if isinstance(data.get("size"), str) else {}
        if isinstance(mixer, dict) and mixer["type"] == "dcnv3":
            mixer = {**known.get("mixer", {}), **mixer}
        return {**known, **data, **({"mixer": mixer} if "mixer" in data else {})}

    @model_validator(mode="after")
    def _check(self) -> "InternImageSettings":
        for stage, groups in enumerate(self.groups):
            if self.channels * 2**stage % groups:
                raise ValueError(
                    f"groups[{stage}] ({groups}) must divide the {self.channels * 2**stage} "
                    "channels of its stage"
                )
        if self.channels % 2:
            raise ValueError(f"channels ({self.channels}) must be even: the stem begins with half")
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise ValueError(
                "res_post_norm goes with neither post_norm nor layer_scale: the norms that it adds "
                "would have no place"
            )
        if sorted(set(self.post_norm_layers)) != self.post_norm_layers:
            raise ValueError(f"post_norm_layers: {self.post_norm_layers} must rise: a layer has "
                             "one such norm")
        if wrong := [n for n in self.post_norm_layers if not 0 <= n < self.depths[2]]:
            raise ValueError(
                f"post_norm_layers: the third stage has layers 0..{self.depths[2] - 1}, not {wrong}"
            )
        return self

    @property
    def size_multiple(self) -> int:
        """Sides of images must be multiples of this."""
        return 32 if isinstance(self.head, ProjectorSettings) else 1

    @property
    def any_sides(self) -> bool:
        """Whether images of other sides are taken too."""
        return self.size_multiple == 1

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image."""
        return ("mean",) if self.head is None else ("mean", "head")

    def build(self) -> "InternImage":
        """The encoder these settings describe, on torch's default device."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        for name in ("type", "size", "mixer"):
            del fields[name]
        return InternImage(**fields, mixer=self.mixer.build)


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
