"""The text decoder of GIT: a post-norm transformer that reads image tokens and writes captions.

Image tokens attend to image tokens only; a text token attends to all image tokens and to the text
before it in its own caption. Since no image token ever looks at text, the image side is computed
once per image and serves all captions of that image: their texts lie side by side in one sequence,
kept apart by one small mask that all rows of the batch share.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.git.settings import (  # noqa: F401
    GitDecoderSettings,
)


class GitDecoder(nn.Module):
    """Projection of the image tokens, text embedding, layers, and scores over the vocabulary.

    Arguments after `vocab_size` and `visual_width` are the fields of `GitDecoderSettings`.
    """

    def __init__(
        self,
        vocab_size: int,
        visual_width: int,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
        mlp_width: int = 3072,
        max_positions: int = 1024,
        frames: int = 0,
        dropout: float = 0.1,
        tied_output: bool = True,
        embedding_norm_eps: float = 1e-8,
        initial_std: float = 0.02,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.width = width
        self.max_positions = max_positions
        self.gradient_checkpointing = gradient_checkpointing
        self.temporal = TemporalEmbedding(frames, visual_width) if frames else None
        self.projection = VisualProjection(visual_width, width)
        self.embedding = TextEmbedding(
            vocab_size, width, max_positions, embedding_norm_eps, dropout
        )
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, mlp_width, dropout) for _ in range(layers)
        )
        self.output = WordScores(width, vocab_size)
        self.tied_output = tied_output
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.initial_std = {"weight": initial_std}
        self._tie()

    def _tie(self) -> None:
        if self.tied_output:
            self.output.weight = self.embedding.words.weight

    def _apply(self, fn, recurse=True):
        # Leaving the meta device makes new parameters module by module, which would part the two.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(self, image_tokens: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Scores for the word after each of the chosen text positions.

        image_tokens: (B, N, visual_width), in the dtype of the weights.
        tokens: (B, K, T) int64, K captions per image, padded on the right only.
        positions: (P,) int64, indices into the flattened (B * K * T) text positions.
        Returns logits (P, vocab_size) in the dtype of the weights.
        """
        return self.output(self.read(image_tokens, tokens, positions))

    def read(self, image_tokens: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the scores are computed from: (P, width); arguments as of `forward`."""
        batch, captions, length = tokens.shape
        text = self.embedding(tokens).flatten(1, 2)
        image = self.projection(image_tokens)
        image_length = image.shape[1]
        mask = caption_mask(captions, length, image_length, tokens.device)
        hidden = self.run_layers(torch.cat([image, text], dim=1), image_length, mask)
        hidden = hidden.reshape(batch * captions * length, self.width)
        return hidden.index_select(0, positions)

    def run_layers(
        self,
        hidden: Tensor,
        image_length: int,
        mask: Tensor | None,
        caches: "list[LayerCache] | None" = None,
    ) -> Tensor:
        """Pass [image; text] through the layers; the last one leaves the image half out.

        hidden: (B, image_length + S, width); image_length is 0 once the image lies in the caches.
        mask: (S, keys) bool, True where a text token may look; None lets it look at every key.
        Returns the text half: (B, S, width).
        """
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and caches is None
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            if recompute:
                hidden = checkpoint(layer, hidden, image_length, mask, last, use_reentrant=False)
            else:
                cache = None if caches is None else caches[i]
                hidden = layer(hidden, image_length, mask, last, cache)
        return hidden

    def flops(
        self, image_tokens: int, visual_width: int, captions: int, length: int, scored: float
    ) -> int:
        """Floating-point operations of one forward pass over one image (matrix products only).

        `captions` texts of `length` tokens are read; `scored` positions (on average, over images)
        reach the output.
        """
        image, text, width = image_tokens, captions * length, self.width
        mlp_width = self.layers[0].mlp_width
        per_token = 2 * (4 * width * width + 2 * width * mlp_width)
        attention = 4 * width * (image * image + text * image + captions * length * length)
        total = len(self.layers) * ((image + text) * per_token + attention)
        # In the last layer image tokens only give keys and values.
        total -= image * (per_token - 4 * width * width) + 4 * width * image * image
        total += 2 * image * visual_width * width
        return round(total + 2 * scored * width * self.vocab_size)


class WordScores(nn.Linear):
    """Scores over the vocabulary, or what is made of them without holding them all."""

    def forward(self, hidden: Tensor, then: Callable[..., Any] | None = None) -> Any:
        """hidden: (..., width). Returns (..., vocab_size), or what `then(hidden, weight, bias)`
        does: it runs in here, where ZeRO-3 has gathered both."""
        if then is None:
            return super().forward(hidden)
        return then(hidden, self.weight, self.bias)


class TemporalEmbedding(nn.Module):
    """A learned vector for each place in a clip, added to the encoder's tokens of that frame."""

    def __init__(self, frames: int, visual_width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(frames, 1, visual_width))
        self.initial_std = {"vectors": 0.0}

    def forward(self, frame_tokens: Tensor) -> Tensor:
        """frame_tokens: (B, F, N, visual_width). Returns (B, F * N, visual_width), frame by frame.

        Raises:
            ValueError: more frames than there are vectors.
        """
        frames, most = frame_tokens.shape[1], len(self.vectors)
        if frames > most:
            raise ValueError(f"a clip of {frames} frames, but decoder.frames is {most}")
        return (frame_tokens + self.vectors[:frames]).flatten(1, 2)


class VisualProjection(nn.Module):
    """Image tokens to the width of the decoder: a linear layer, then LayerNorm."""

    def __init__(self, visual_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(visual_width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """image_tokens: (B, N, visual_width). Returns (B, N, width)."""
        return self.norm(self.linear(image_tokens))


class TextEmbedding(nn.Module):
    """Word and learned absolute position, added, normalised, with dropout."""

    def __init__(
        self, vocab_size: int, width: int, max_positions: int, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_positions, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """tokens: (..., T) int64, of which the first stands at position `start`; texts of different
        lengths are read on with a tensor (...) of it, and padding of theirs may reach beyond the
        table.

        Returns (..., T, width).
        """
        if isinstance(start, Tensor):
            positions = start[..., None] + torch.arange(tokens.shape[-1], device=tokens.device)
            positions = self.positions(positions.clamp(max=self.max_positions - 1))
            return self.dropout(self.norm(self.words(tokens) + positions))
        end = start + tokens.shape[-1]
        if end > self.max_positions:
            raise ValueError(
                f"a text of {end} tokens does not fit into max_positions {self.max_positions}; "
                "shorten the captions (text_length, max_new_tokens) or enlarge max_positions"
            )
        positions = torch.arange(start, end, device=tokens.device)
        return self.dropout(self.norm(self.words(tokens) + self.positions(positions)))


class DecoderLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), over image and text in one sequence."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.mlp_width = mlp_width
        self.attention = PrefixAttention(width, heads, dropout)
        self.norm_attention = nn.LayerNorm(width, eps=1e-12)
        self.expand = nn.Linear(width, mlp_width)
        self.reduce = nn.Linear(mlp_width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Tensor,
        image_length: int,
        mask: Tensor | None,
        text_only: bool = False,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """hidden: (B, image_length + S, width); arguments as in `GitDecoder.run_layers`.

        Returns the same shape, or with `text_only` the text half (B, S, width).
        """
        mixed = self.attention(hidden, image_length, mask, text_only, cache)
        if text_only:
            hidden = hidden[:, image_length:]
        hidden = self.norm_attention(hidden + self.dropout(mixed))
        update = self.reduce(F.gelu(self.expand(hidden)))
        return self.norm_mlp(hidden + self.dropout(update))


class PrefixAttention(nn.Module):
    """Self-attention in which text sees the image and its own past, and the image sees itself."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        image_length: int,
        mask: Tensor | None,
        text_only: bool,
        cache: "LayerCache | None",
    ) -> Tensor:
        """Arguments and result as in `DecoderLayer.forward`, without residual and norm."""
        asking = hidden[:, image_length:] if text_only else hidden
        query = self._split(self.query(asking))
        key, value = self._split(self.key(hidden)), self._split(self.value(hidden))
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        attend = F.scaled_dot_product_attention
        if text_only or image_length == 0:
            mixed = attend(query, key, value, mask, dropout)
        else:
            n = image_length
            image = attend(query[:, :, :n], key[:, :, :n], value[:, :, :n], None, dropout)
            text = attend(query[:, :, n:], key, value, mask, dropout)
            mixed = torch.cat([image, text], dim=2)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (B, heads, S, width // heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LayerCache:
    """Keys and values that one layer has seen, in buffers of a fixed size."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, heads, S, head_dim) each; returns all that is held so far, on the same axis."""
        if self.keys is None or self.values is None:
            batch, heads, _, size = key.shape
            self.keys = key.new_empty(batch, heads, self.capacity, size)
            self.values = value.new_empty(batch, heads, self.capacity, size)
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def caption_mask(captions: int, length: int, image_length: int, device: torch.device) -> Tensor:
    """What each text token may look at, the same for every image of the batch.

    Returns (captions * length, image_length + captions * length) bool: the whole image, and the
    tokens up to itself in its own caption. Padding needs no entry: it stands on the right, where
    no supervised token looks.
    """
    index = torch.arange(captions * length, device=device)
    same_caption = (index[:, None] // length) == (index[None, :] // length)
    text = same_caption & (index[:, None] >= index[None, :])
    return F.pad(text, (image_length, 0), value=True)
