"""BERT-like text encoder: token ids in, one vector for each token out, or one for the text."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.bert.settings import (  # noqa: F401
    BertSettings,
)
from pretrain.models.encoder import Encoded, Encoder, Output
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.text import end_of_text


class Bert(Encoder):
    """Transformer with norms behind each sum, and token types. Without dropout.

    Arguments after `first_position` (the row of the first token's position) are the fields of
    `BertSettings`.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_id: int,
        first_position: int = 2,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        max_positions: int = 512,
        token_types: int = 1,
        norm_eps: float = 1e-5,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.hidden, self.eos_id = width, hidden, eos_id
        self.max_positions = max_positions
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding = BertEmbedding(
            vocab_size, width, max_positions, first_position, token_types, norm_eps
        )
        self.layers = nn.ModuleList(
            BertLayer(width, heads, hidden, norm_eps) for _ in range(layers)
        )

    @property
    def pooled_width(self) -> int:
        """Channels of the feature of a text."""
        return self.width

    def forward(self, tokens: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """The output at the first token (B, width) of texts (B, T) int64, rows BOS w.. EOS and
        anything behind it."""
        return self.sequence(tokens)[0][:, 0]

    def encode(
        self,
        tokens: Tensor,
        want: Collection[Output],
        draws: SampleDraws | None = None,
        *,
        joined: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Encoded:
        """As `Encoder.encode`: a vector for each token, with a mask that is True up to EOS, or the
        output at the first one."""
        self.unwanted(want, ("tokens", "pooled"))
        if joined is not None or groups is not None:
            raise ValueError("nothing joins the tokens of a text, and they are not in groups")
        found, mask = self.sequence(tokens)
        return Encoded(
            tokens=found if "tokens" in want else None,
            pooled=found[:, 0] if "pooled" in want else None,
            mask=mask if "tokens" in want else None,
        )

    def sequence(
        self,
        tokens: Tensor,
        present: Tensor | None = None,
        causal: bool = False,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A vector for each token of texts (B, T) int64.

        present: (B, T) bool, tokens that are there, from the left; None: those up to EOS.
        causal: a token sees those up to itself alone, for a text that is to be predicted: else its
            words would tell each other what comes next.
        documents: (B, T) int64; tokens with different numbers do not see each other.

        Returns (B, T, width), and `present`.
        """
        if present is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            present = places <= end_of_text(tokens, self.eos_id)[:, None]
        mask = text_mask(present, causal, documents)
        hidden = self.embedding(tokens)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                hidden = checkpoint(
                    layer, hidden, mask, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = layer(hidden, mask)
        return hidden, present

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`."""
        return [("embedding",), *((f"layers.{number}",) for number in range(len(self.layers)))]

    def flops(self, length: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`, matrix products only; length: tokens of the text."""
        linear = 2 * length * (4 * self.width**2 + 2 * self.width * self.hidden)
        return len(self.layers) * (linear + 4 * length**2 * self.width)


class BertEmbedding(nn.Module):
    """Word, position and type, added and normalised."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        max_positions: int,
        first_position: int,
        token_types: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.max_positions, self.first_position = max_positions, first_position
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(first_position + max_positions, width))
        self.types = nn.Parameter(torch.zeros(token_types, width))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.initial_std = {"positions": 0.02, "types": 0.02}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Returns (B, T, width)."""
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"a text of {length} tokens does not fit into max_positions {self.max_positions}; "
                "shorten the texts (text_length) or enlarge max_positions"
            )
        places = self.positions[self.first_position : self.first_position + length]
        return self.norm(self.words(tokens) + self.types[0] + places)


class BertLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width, eps=norm_eps)
        self.expand, self.reduce = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_mlp = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: (B, T, width); mask: bool, True where a token may look, broadcast to (B, heads,
        T, T). Returns the shape of tokens."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        mixed = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        tokens = self.norm_attention(tokens + mixed)
        return self.norm_mlp(tokens + self.reduce(F.gelu(self.expand(tokens))))


def text_mask(present: Tensor, causal: bool, documents: Tensor | None = None) -> Tensor:
    """Where tokens may look, bool: (B, 1, 1, T), or (B, 1, T, T) where that depends on who looks.
    A token always sees itself, so that padding gives numbers. Arguments as of `Bert.sequence`."""
    mask = present[:, None, None]
    places = torch.arange(present.shape[1], device=present.device)
    if causal:
        mask = mask & (places[:, None] >= places)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask | (places[:, None] == places) if mask.shape[2] > 1 else mask
