"""Settings of GIT's decoder, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from pretrain.models.git.decoder import GitDecoder


class GitDecoderSettings(Settings):
    """Shape of the decoder; the defaults are those of GIT."""

    width: int = Field(768, gt=0)
    """Channels of a token."""
    layers: int = Field(6, gt=0)
    """Number of transformer layers."""
    heads: int = Field(12, gt=0)
    """Attention heads; must divide `width`."""
    mlp_width: int = Field(3072, gt=0)
    """Hidden channels of the feed-forward part."""
    max_positions: int = Field(1024, gt=1)
    """Rows of the position table: the longest caption in tokens, BOS and EOS counted."""
    frames: int = Field(0, ge=0)
    """Frames of a clip that the decoder can tell apart, by a learned vector for each; 6 in GIT.
    0: it reads single images."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on embeddings, attention weights and layer outputs in training."""
    tied_output: bool = True
    """Score words with the word embeddings; otherwise the output has a matrix of its own."""
    embedding_norm_eps: float = Field(1e-8, gt=0)
    """Epsilon of the text embedding's LayerNorm: 1e-8 in the original, 1e-12 in transformers."""
    initial_std: float = Field(0.02, gt=0)
    """Standard deviation of the first weights. GIT's 0.02 suits its width of 768; about
    width ** -0.5 is better below 256, where attention starts too even to find the image."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: more time for less memory."""

    @model_validator(mode="after")
    def _check(self) -> GitDecoderSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self

    def build(self, vocab_size: int, visual_width: int) -> GitDecoder:
        """The decoder for a vocabulary and an encoder whose tokens have `visual_width` channels."""
        from pretrain.models.git.decoder import GitDecoder

        return GitDecoder(vocab_size, visual_width, **self.model_dump())
