"""Settings of GIT's decoder, which need no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

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


class GenerationSettings(Settings):
    """How the evaluations of a run write texts; an export writes greedily, whatever this says."""

    kind: Literal["greedy", "beam", "sample"] = "greedy"
    """The likeliest word each time, a search with several texts at once, or drawn words."""
    beams: int = Field(4, gt=1)
    """Texts that a search goes on with."""
    length_penalty: float = Field(1.0, ge=0)
    """Power of a text's length that its log-probability is divided by; 0.6 in GIT's own code."""
    normalisation: Literal["transformers", "original"] = "transformers"
    """Rules of a search: those of transformers, or those of GIT's own code."""
    temperature: float = Field(1.0, gt=0)
    """Divides the scores that words are drawn by."""
    top_k: int = Field(0, ge=0)
    """Draw from so many likeliest words; 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest words that have this share of the probability together."""
    seed: int = 0
    """Of the drawn words, with the image's row in its data set."""

    _OF: ClassVar[dict[str, tuple[str, ...]]] = {
        "beam": ("beams", "length_penalty", "normalisation"),
        "sample": ("temperature", "top_k", "top_p", "seed"),
    }

    @model_validator(mode="after")
    def _belongs(self) -> GenerationSettings:
        for kind, names in self._OF.items():
            idle = [n for n in names if n in self.model_fields_set and kind != self.kind]
            if any(getattr(self, n) != type(self).model_fields[n].default for n in idle):
                raise ValueError(f"{', '.join(idle)}: only where kind is {kind}, not {self.kind}")
        return self

    def build(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`write_texts` in the way that these settings describe."""
        from pretrain.models.git.generation import write_texts

        return partial(write_texts, self)
