"""Settings of M3I's decoder, which need no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class DecoderSettings(Settings):
    """Shape of projector and predictor, transformers with layer norms; the defaults are those of
    SiameseIM beside a ViT-B."""

    width: int = Field(768, gt=0, multiple_of=4)
    """Channels of a token, and of the targets."""
    heads: int = Field(16, gt=0)
    """Attention heads; must divide `width`."""
    projector_layers: int = Field(2, ge=0)
    """Blocks of the projector, which the target branch has too."""
    predictor_layers: int = Field(4, ge=1)
    """Blocks of the predictor, which only the trained branch has."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden channels of the MLPs, as a multiple of `width`."""

    @model_validator(mode="after")
    def _check(self) -> DecoderSettings:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self
