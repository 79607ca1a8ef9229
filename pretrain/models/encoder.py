"""What an encoder is: the contract between a run's objectives and what they read images or texts
with. README.md, beside this file, says how to add one.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.sample_draws import SampleDraws

Output = Literal["tokens", "cells", "pooled", "maps"]
"""One of the things that `Encoder.encode` can be asked for; see `Encoded`."""


class Encoded(NamedTuple):
    """What an encoder makes of a batch; None for what was not asked for."""

    tokens: Tensor | None = None
    """(B, N, width): all tokens, those that stand for the whole image among them."""
    cells: Tensor | None = None
    """(B, rows * columns, C), row by row: one vector for each cell of `Encoder.grid("cells")`, for
    objectives that must know where in the image they are."""
    pooled: Tensor | None = None
    """(B, pooled_width): the vector that the encoder itself makes of an image or a text."""
    maps: list[Tensor] | None = None
    """(B, H_i, W_i, C_i) each, channels-last, from fine to coarse: see `Encoder.map_grids`."""
    mask: Tensor | None = None
    """(B, N) bool: which of `tokens` are there; None: all."""


class Grid(NamedTuple):
    """Where features lie in an image: a vector for each square of `stride` pixels."""

    width: int
    """Channels of a vector."""
    stride: int
    """Side of a square in pixels."""
    partial: bool
    """Whether squares that stick out of the image count."""

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image of so many pixels."""
        if self.partial:
            return -(-height // self.stride), -(-width // self.stride)
        return height // self.stride, width // self.stride


class Encoder(nn.Module):
    """Base of all encoders, and of modules between encoders and objectives that tasks share.

    A subclass sets `width`, and gives `forward`, `encode`, `flops` and `layer_names`; what else
    there is has a default that says that this encoder has it not. Parameters of shape () and batch
    statistics of a rank are no good here: see README.md.
    """

    width: int
    """Channels of a token."""
    pools_cells = False
    """Whether there are `pool_cells` and `normed`."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type in which the encoder computes, and of the images that it is given."""
        return next(self.parameters()).dtype

    @property
    def pooled_width(self) -> int:
        """Channels of `Encoded.pooled`. Raises ValueError: there is no such vector."""
        raise ValueError(
            f"pool=head needs an encoder with a head of its own, which {type(self).__name__} has "
            "not: use pool=mean"
        )

    def forward(self, inputs: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """What most objectives read: tokens (B, N, width) of images, one vector (B, width) of a
        text. Arguments as in `encode`."""
        raise NotImplementedError

    def encode(
        self,
        inputs: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """All that is asked for, in one pass.

        Args:
            inputs: images (B, 3, H, W), normalised, in `dtype`; or texts (B, T) int64.
            want: some of what there is.
            draws: random numbers of these samples, for an encoder that draws in training; none: it
                draws from torch's generator, which knows no samples.
            joined: (B, rows, columns, C) of `grid("stem")`, added to what the first layer makes.
            groups: (B, rows, columns) of `grid("cells")`, bool or integer: a cell may look at those
                of its own group alone.

        Raises:
            ValueError: this encoder has not what is wanted, or cannot do what is asked.
        """
        raise NotImplementedError

    def grid(self, of: Literal["stem", "cells"]) -> Grid:
        """Where the cells lie, or what may be `joined`. Raises ValueError: there is none."""
        raise ValueError(f"{type(self).__name__} has no grid of {of}")

    def map_grids(self) -> tuple[Grid, ...]:
        """Where each of the `maps` lies, from fine to coarse."""
        return ()

    def pool_cells(self, cells: Tensor, own: Tensor | None = None) -> Tensor:
        """(B, pooled_width) of some cells, by the encoder's own head, before its last norm.

        cells: (B, N, C) as in `Encoded`; own: (B, N) bool, those that count; None: all.
        """
        raise NotImplementedError

    def normed(self, pooled: Tensor) -> Tensor:
        """The last norm, on what `pool_cells` returned."""
        raise NotImplementedError

    def flops(self, *size: int, want: Output = "tokens") -> int:
        """Floating-point operations of a forward pass over one sample, a multiply-add being two.

        size: height and width of an image in pixels, or tokens of a text.
        want: up to which output.
        """
        raise NotImplementedError

    def pool_flops(self, cells: int) -> int:
        """Floating-point operations of `pool_cells` for one image."""
        raise NotImplementedError

    def layer_names(self) -> list[tuple[str, ...]]:
        """Names of the submodules of each layer, from the input on: every parameter belongs to one.
        The optimizer's `layer_decay` goes by them."""
        raise NotImplementedError

    def unwanted(self, want: Collection[Output], offered: Collection[Output]) -> None:
        """Raise ValueError for what is wanted and not offered."""
        if missing := sorted(set(want) - set(offered)):
            raise ValueError(
                f"{type(self).__name__} gives {', '.join(offered)}, but no {', '.join(missing)}"
            )
