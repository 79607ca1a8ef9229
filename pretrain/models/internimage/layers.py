"""What InternImage is made of: stem, layers, stages. Maps are channels-last throughout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.internimage.channels_last import Conv, layer_norm
from pretrain.models.internimage.dcnv3 import DCNv3


class Stem(nn.Module):
    """Two strided convolutions: (B, H, W, 3) -> (B, H / 4, W / 4, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(3, channels // 2, 3, 2, 1)
        self.norm1 = layer_norm(channels // 2, 1)
        self.conv2 = Conv(channels // 2, channels, 3, 2, 1)
        self.norm2 = layer_norm(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, 3); sides are rounded up."""
        x = F.gelu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))

    def flops(self, half: int, quarter: int) -> int:
        """Multiplications and additions, by the positions behind the two convolutions."""
        return self.conv1.flops(half) + self.conv2.flops(quarter)


class Downsample(nn.Module):
    """Strided convolution between stages: half the side (rounded up), twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, 2 * channels, 3, 2, 1, bias=False)
        self.norm = layer_norm(2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, channels)."""
        return self.norm(self.conv(x))


class Mlp(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels). Returns the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """x + gamma1 * mix(x), then x + gamma2 * mlp(x).

    Norms stand before the two (the usual form), behind them (`post_norm`), or on both sides
    (`res_post_norm`). Without `layer_scale` there are no gammas.
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        mlp_ratio: float,
        post_norm: bool,
        res_post_norm: bool,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.post_norm, self.res_post_norm = post_norm, res_post_norm
        self.layer_scale = layer_scale is not None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.zeros(channels))
            self.gamma2 = nn.Parameter(torch.zeros(channels))
            self.initial_value = {"gamma1": layer_scale, "gamma2": layer_scale}
        # The official name of the mixer is that of the only one that the official code has.
        self.mixer_name = "dcn" if isinstance(mixer, DCNv3) else "mixer"
        self.norm1 = layer_norm(channels)
        self.add_module(self.mixer_name, mixer)
        self.norm2 = layer_norm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        if res_post_norm:
            self.res_post_norm1 = layer_norm(channels)
            self.res_post_norm2 = layer_norm(channels)

    @property
    def token_mixer(self) -> nn.Module:
        """What mixes the positions, whatever its name is."""
        return self.get_submodule(self.mixer_name)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """One layer.

        x: (B, H, W, channels). kept: (2, B), factors of the two branches for each sample, 0 where a
            branch is dropped; none = 1.

        Returns the shape of x.
        """
        mixer = self.token_mixer
        if self.post_norm:
            mixed = self.norm1(mixer(x))
        else:
            mixed = mixer(self.norm1(x))
        if self.res_post_norm:
            mixed = self.res_post_norm1(mixed)
        x = self._add(x, mixed, 0, kept)
        if self.post_norm:
            changed = self.norm2(self.mlp(x))
        else:
            changed = self.mlp(self.norm2(x))
        if self.res_post_norm:
            changed = self.res_post_norm2(changed)
        return self._add(x, changed, 1, kept)

    def _add(self, x: Tensor, branch: Tensor, number: int, kept: Tensor | None) -> Tensor:
        if self.layer_scale:
            branch = branch * (self.gamma1, self.gamma2)[number]
        if kept is None:
            return x + branch
        return torch.addcmul(x, branch, kept[number][:, None, None, None])

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map."""
        mlp = 4 * height * width * self.channels * self.mlp.hidden
        return self.token_mixer.flops(height, width) + mlp


class Stage(nn.Module):
    """Layers at one resolution, a norm behind them, and the way down to the next stage.

    `post_norms` are further norms on the residual stream, behind the layers that
    `post_norm_layers` numbers.
    """

    def __init__(
        self,
        layers: list[Layer],
        norm: bool,
        post_norm_layers: tuple[int, ...],
        downsample: bool,
    ) -> None:
        super().__init__()
        channels = layers[0].channels
        self.blocks = nn.ModuleList(layers)
        self.post_norm_layers = post_norm_layers
        self.norm = layer_norm(channels) if norm else nn.Identity()
        if post_norm_layers:
            self.post_norms = nn.ModuleList(layer_norm(channels) for _ in post_norm_layers)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor, kept: Tensor | None = None, recompute: bool = False) -> Tensor:
        """The map (B, H, W, channels) behind the stage, before `downsample`.

        x: the same shape; kept: (layers, 2, B), see `Layer`; recompute: keep only the inputs of the
        layers for the backward pass.
        """
        for number, block in enumerate(self.blocks):
            own = None if kept is None else kept[number]
            if recompute:
                x = checkpoint(block, x, own, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, own)
            if number in self.post_norm_layers:
                x = self.post_norms[self.post_norm_layers.index(number)](x)
        return self.norm(x)

    def flops(self, height: int, width: int) -> int:
        """Multiplications and additions for one map, without `downsample`."""
        return sum(block.flops(height, width) for block in self.blocks)
