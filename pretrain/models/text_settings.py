"""Settings of the text encoder, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.models.encoder_settings import EncoderSettings
from pretrain.models.vit_settings import Activation

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.text import TextEncoder


class TextEncoderSettings(EncoderSettings):
    """Shape of a text transformer; the defaults are those beside CLIP's ViT-B/16."""

    reads: ClassVar[str] = "text"
    reads_text: ClassVar[bool] = True
    type: Literal["text"] = "text"
    """Selects this encoder among the kinds that a recipe may name."""
    width: int = Field(512, gt=0)
    """Channels of a token, and of the feature."""
    layers: int = Field(12, gt=0)
    """Number of transformer blocks."""
    heads: int = Field(8, gt=0)
    """Attention heads; must divide `width`."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLP, as a multiple of `width`."""
    activation: Activation = "quick_gelu"
    """Non-linearity of the MLP; `quick_gelu` is what CLIP weights were trained with."""
    max_positions: int = Field(77, gt=1)
    """Rows of the position table: the longest text in tokens, BOS and EOS counted."""
    causal: bool = True
    """Each token sees those before it only, as in CLIP; otherwise all of its text."""
    position_std: float = Field(0.01, gt=0)
    """Standard deviation of the first position embeddings; words have 0.02."""
    pool: Literal["end", "mean"] = "end"
    """What stands for a text: the output at its EOS, as in CLIP, or the mean over its tokens."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on embeddings and on what each block adds, in training."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: more time for less memory."""

    @model_validator(mode="after")
    def _check(self) -> TextEncoderSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self

    @property
    def longest_text(self) -> int:
        """As many tokens as there are positions."""
        return self.max_positions

    def build(self, context: BuildContext) -> TextEncoder:
        """The encoder for the vocabulary of the context."""
        from pretrain.models.text import TextEncoder

        words = context.vocabulary
        return TextEncoder(words.vocab_size, words.eos_id, **self.model_dump(exclude={"type"}))
