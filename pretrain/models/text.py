"""CLIP-style text transformer: token ids in, one feature vector per text out, or one per token.

Any text encoder of the project also has `.max_positions`.
"""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.encoder import Encoded, Encoder, Output
from pretrain.models.pooling import masked_mean
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.text_settings import (  # noqa: F401
    TextEncoderSettings,
)
from pretrain.models.vit import Activation, Block


class TextEncoder(Encoder):
    """Pre-norm transformer over a text; the feature is the normalised output at the text's EOS, or
    the mean over its tokens up to there.

    Arguments after `vocab_size` and `eos_id` are the fields of `TextEncoderSettings`.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_id: int,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
        max_positions: int = 77,
        causal: bool = True,
        position_std: float = 0.01,
        pool: Literal["end", "mean"] = "end",
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.eos_id = eos_id
        self.max_positions = max_positions
        self.causal = causal
        self.pool = pool
        self.gradient_checkpointing = gradient_checkpointing
        hidden = round(width * mlp_ratio)
        self.embedding = WordEmbedding(vocab_size, width, max_positions, position_std, dropout)
        self.blocks = nn.ModuleList(
            TextBlock(width, heads, hidden, activation, layers, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def pooled_width(self) -> int:
        """Channels of the feature of a text."""
        return self.width

    def forward(self, tokens: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Encode texts.

        tokens: (B, T) int64, rows BOS w.. EOS and anything behind it; T at most max_positions.
        Returns (B, width): a function of the tokens up to EOS alone.
        """
        return self._pooled(*self._hidden(tokens))

    def encode(
        self,
        tokens: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """As `Encoder.encode`: a normalised vector for each token, with a mask that is True up to
        EOS, or the feature of the text."""
        self.unwanted(want, ("tokens", "pooled"))
        if joined is not None or groups is not None:
            raise ValueError("nothing joins the tokens of a text, and they are not in groups")
        hidden, end = self._hidden(tokens)
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
        return Encoded(
            tokens=self.norm(hidden) if "tokens" in want else None,
            pooled=self._pooled(hidden, end) if "pooled" in want else None,
            mask=mask if "tokens" in want else None,
        )

    def _hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks make (B, T, width), and the place of EOS (B,)."""
        end = end_of_text(tokens, self.eos_id)
        mask = self._mask(end, tokens.shape[1])
        hidden = self.embedding(tokens)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                hidden = checkpoint(block, hidden, mask, use_reentrant=False)
            else:
                hidden = block(hidden, mask)
        return hidden, end

    def _pooled(self, hidden: Tensor, end: Tensor) -> Tensor:
        if self.pool == "mean":
            places = torch.arange(hidden.shape[1], device=hidden.device)
            return masked_mean(self.norm(hidden), places <= end[:, None])
        at_end = hidden.gather(1, end[:, None, None].expand(-1, 1, self.width))
        return self.norm(at_end[:, 0])

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`."""
        blocks = [(f"blocks.{index}",) for index in range(len(self.blocks))]
        return [("embedding",), *blocks, ("norm",)]

    def flops(self, length: int, want: Output = "pooled") -> int:
        """As `Encoder.flops`, matrix products only; length: tokens of the text."""
        channels, hidden = self.width, self.blocks[0].mlp.hidden
        linear = 2 * length * (4 * channels * channels + 2 * channels * hidden)
        return len(self.blocks) * (linear + 4 * length * length * channels)

    def _mask(self, end: Tensor, length: int) -> Tensor:
        """Where tokens may look: (T, T) if causal, else (B, 1, 1, T); bool."""
        places = torch.arange(length, device=end.device)
        if self.causal:
            # What stands behind EOS is out of its sight anyway.
            return places[:, None] >= places
        return (places <= end[:, None])[:, None, None]


class WordEmbedding(nn.Module):
    """Word and learned absolute position, added, with dropout."""

    def __init__(
        self, vocab_size: int, width: int, max_positions: int, position_std: float, dropout: float
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(max_positions, width))
        self.dropout = nn.Dropout(dropout)
        self.initial_std = {"positions": position_std}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Returns (B, T, width)."""
        length, rows = tokens.shape[1], self.positions.shape[0]
        if length > rows:
            raise ValueError(
                f"a text of {length} tokens does not fit into max_positions {rows}; shorten the "
                "captions (text_length) or enlarge max_positions"
            )
        return self.dropout(self.words(tokens) + self.positions[:length])


class TextBlock(Block):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: Activation,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__(width, heads, hidden, activation, layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: (B, T, width); mask as in `SelfAttention`. Returns the shape of tokens."""
        mixed = self.attention(self.norm_attention(tokens), mask)
        tokens = tokens + self.dropout(mixed)
        return tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))


def end_of_text(tokens: Tensor, eos_id: int) -> Tensor:
    """Place of the first EOS behind the first token, (B,) int64; the last place without one.

    tokens: (B, T) int64. The first token does not count: in some vocabularies BOS is EOS.
    """
    is_end = tokens == eos_id
    is_end[:, 0] = False
    is_end[:, -1] = True
    return is_end.int().argmax(dim=1)
