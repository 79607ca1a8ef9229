"""Settings of captioning, which need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from data_pipeline.settings import Settings
from pretrain.models.git_settings import GitDecoderSettings

if TYPE_CHECKING:
    from torch import nn

    from pretrain.objectives.caption_evaluation import Vocabulary
    from pretrain.objectives.captioning import Captioning


class CaptioningSettings(Settings):
    """Captioning with a GIT decoder on the tokens of one of the run's encoders."""

    data_type: ClassVar[str] = "captions"
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images"}
    type: Literal["captioning"] = "captioning"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` whose tokens the decoder reads."""
    decoder: GitDecoderSettings = GitDecoderSettings()
    """The text decoder, which belongs to this task."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread over the words that are not the label."""
    max_new_tokens: int = Field(40, gt=0)
    """Longest caption that generation writes, in tokens, EOS counted."""

    def build(
        self,
        encoders: Mapping[str, nn.Module],
        vocabulary: Vocabulary,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> Captioning:
        """The objective for these encoders, a tokenizer and the pixel statistics of the data.

        Raises:
            ValueError: `encoder` names none of the encoders, or captions cannot be that long.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.captioning import Captioning
        from pretrain.objectives.image_tokens import find_encoder

        encoder = find_encoder(encoders, self.encoder)
        if self.max_new_tokens > self.decoder.max_positions:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) exceeds decoder.max_positions "
                f"({self.decoder.max_positions})"
            )
        return Captioning(
            self.decoder.build(vocabulary.vocab_size, encoder.width),
            encoder=self.encoder,
            encoder_cost=lambda height, width: (
                encoder.tokens(height, width),
                training_flops(encoder, encoder.flops)(height, width),
            ),
            visual_width=encoder.width,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            image_mean=image_mean,
            image_std=image_std,
            label_smoothing=self.label_smoothing,
            max_new_tokens=self.max_new_tokens,
        )
