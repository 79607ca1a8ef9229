"""Settings of captioning, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pretrain.models.git.settings import GenerationSettings, GitDecoderSettings
from pretrain.objectives.objective_settings import ObjectiveSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.objectives.captioning.captioning import Captioning


class CaptioningSettings(ObjectiveSettings):
    """Captioning with a GIT decoder on the tokens of one of the run's encoders."""

    data_type: ClassVar[str] = "captions"
    writes_texts: ClassVar[bool] = True
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
    generation: GenerationSettings = GenerationSettings()
    """How an evaluation writes captions."""

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """Captions fit the decoder, and clips meet one that tells their frames apart."""
        found = []
        positions = self.decoder.max_positions
        if task.data.text_length > positions:
            found.append(
                f"{where}.data.text_length={task.data.text_length} exceeds "
                f"{where}.objective.decoder.max_positions={positions}: raise max_positions or "
                "lower text_length"
            )
        if self.max_new_tokens > positions:
            found.append(
                f"{where}.objective.max_new_tokens={self.max_new_tokens} exceeds "
                f"{where}.objective.decoder.max_positions={positions}: lower max_new_tokens"
            )
        return found + self._clips(where, task)

    def _clips(self, where: str, task: Any) -> list[str]:
        frames, most = task.data.frames, self.decoder.frames
        key = f"{where}.objective.decoder.frames"
        if (frames or 0) > most:
            return [
                f"{where}.data.frames={frames} exceeds {key}={most}: set that to {frames} or more"
            ]
        if most and not frames:
            return [
                f"{key}={most} is for clips, but {where}.data.frames is not set: set both, or none"
            ]
        image = task.evaluation and task.evaluation.image
        if frames and image and image.mode == "keep_aspect":
            return [f"{where}.evaluation.image.mode={image.mode!r}: clips need one size"]
        return []

    def build(self, context: BuildContext) -> Captioning:
        """The objective for the context's encoders, tokenizer and pixel statistics.

        Raises:
            ValueError: `encoder` names none of the encoders, or captions cannot be that long.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.captioning.captioning import Captioning
        from pretrain.objectives.image_tokens import find_encoder

        vocabulary = context.vocabulary
        encoder = find_encoder(context.encoders, self.encoder)
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
            image_mean=context.image_mean,
            image_std=context.image_std,
            label_smoothing=self.label_smoothing,
            max_new_tokens=self.max_new_tokens,
            way=self.generation.build(),
        )
