"""What M3I puts around an encoder: a mark of the source, the target branch, and one vector for
texts and classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.pooling import masked_mean
from pretrain.objectives.m3i.decoder import Projector


class SourceMark(nn.Module):
    """Tells the encoder which cells of a mixed image belong together.

    The first image's cells get a learned vector behind the stem, the second one's get minus that.
    Two free vectors would say the same: what they have in common is a constant, which positions or
    norms hold already; and so an image that is not mixed needs none, and the encoder can be handed
    on without this module.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.zeros(width))
        self.initial_std = {"mark": 0.02}

    def forward(self, masks: Tensor) -> Tensor:
        """masks: (P, rows, columns) bool, the first image's. Returns (P, rows, columns, width)."""
        return torch.where(masks[..., None], self.mark, -self.mark)


class TargetBranch(nn.Module):
    """The momentum copy of encoder and projector: what dense targets come from.

    It never trains: no gradient, no dropout. The engine moves its weights (`optim.momentum`).
    """

    def __init__(self, encoder: nn.Module, projector: Projector) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "TargetBranch":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W), whole images. Returns (B, N, C) float32."""
        return self.projector(self.encoder.encode(pixels, ("cells",)).cells).float()


class MeanPool(nn.Module):
    """Mean of the tokens and an MLP of two layers (figure 1 of M3I), for a ViT."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, width)
        self.reduce = nn.Linear(width, output)
        for layer in (self.expand, self.reduce):
            layer.initial_std = {"weight": width**-0.5}
        self.norm = nn.LayerNorm(output)

    def vectors(self, encoder: nn.Module, tokens: Tensor, own: Tensor | None) -> Tensor:
        """(B, output), to be compared with texts. tokens: (B, N, width); own: (B, N) bool, the
        tokens of the image; none: all."""
        mean = masked_mean(tokens, own)
        return self.reduce(F.gelu(self.expand(mean)))

    def normed(self, encoder: nn.Module, vectors: Tensor) -> Tensor:
        """What the layer of classes reads."""
        return self.norm(vectors)

    def flops(self, encoder: nn.Module, tokens: int) -> int:
        """Multiplications and additions for an image."""
        sizes = (self.expand.in_features, self.expand.out_features, self.reduce.out_features)
        return 2 * sizes[0] * sizes[1] + 2 * sizes[1] * sizes[2]


class ProjectorPool(nn.Module):
    """Attention pooling by the projector of an InternImage, and the norm behind it: both are the
    encoder's own, so that a later stage finds them trained. Methods as of `MeanPool`."""

    def vectors(self, encoder: nn.Module, tokens: Tensor, own: Tensor | None) -> Tensor:
        """(B, head.output)."""
        return encoder.pool_cells(tokens, own)

    def normed(self, encoder: nn.Module, vectors: Tensor) -> Tensor:
        """What the layer of classes reads."""
        return encoder.normed(vectors)

    def flops(self, encoder: nn.Module, tokens: int) -> int:
        """Multiplications and additions for an image."""
        return encoder.pool_flops(tokens)
