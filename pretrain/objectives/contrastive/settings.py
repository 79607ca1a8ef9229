"""Settings of image-text contrast, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.objectives.objective_settings import ObjectiveSettings
from pretrain.objectives.pool import Pool

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.objectives.contrastive.contrastive import Contrastive


class ContrastiveSettings(ObjectiveSettings):
    """Contrast of images and captions over the global batch."""

    data_type: ClassVar[str] = "captions"
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images", "text_encoder": "text"}
    type: Literal["contrastive"] = "contrastive"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` that reads the images."""
    text_encoder: str = "text"
    """Name of the encoder in `model.encoders` (of type `text`) that reads the captions."""
    pool: Pool = "mean"
    """What stands for an image: the mean of its tokens, the first one (`class_token`), or the
    vector that the encoder's own `head` makes."""
    width: int = Field(512, gt=0)
    """Channels of the space that both sides are projected to."""
    temperature: float = Field(0.07, gt=0)
    """First value of the learned temperature, which divides the similarities."""
    max_scale: float = Field(100.0, gt=1)
    """The inverse of the temperature is held at or below this."""
    identical_captions_match: bool = True
    """Equal captions in a batch are matches of each other's images (the target is spread over
    them), and in retrieval too; otherwise they count as wrong, as in CLIP."""
    labels_match: Literal["prompts", "never"] | None = None
    """Texts that were made from class names (a source with `class_names`) match each other's images
    where the name is the same, also in different templates (`prompts`), or not (`never`). null:
    `never` where identical captions do not match, else `prompts`."""
    evaluation_references: int = Field(5, ge=1)
    """Captions of each held-out image that retrieval uses, at most."""

    @model_validator(mode="after")
    def _check(self) -> ContrastiveSettings:
        check_temperature(self.temperature, self.max_scale)
        return self

    @property
    def wanted_pool(self) -> Pool:
        """As of `ObjectiveSettings`."""
        return self.pool

    def held_out_changes(self) -> dict[str, Any]:
        """Retrieval has several texts an image."""
        return {"captions_per_image": self.evaluation_references}

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        return one_text_problems(where, task, recipe)

    def build(self, context: BuildContext) -> Contrastive:
        """The objective for the context's encoders and the pixel statistics of the data.

        Raises ValueError: no encoder of that name, or one that cannot pool that way.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.contrastive.contrastive import Contrastive
        from pretrain.objectives.image_tokens import find_encoder, vector_flops, vector_width

        image = find_encoder(context.encoders, self.encoder)
        text = find_encoder(context.encoders, self.text_encoder)
        return Contrastive(
            self.width,
            encoder=self.encoder,
            text_encoder=self.text_encoder,
            encoder_widths=(vector_width(image, self.pool), text.width),
            encoder_flops=(
                training_flops(image, vector_flops(image, self.pool)),
                training_flops(text, text.flops),
            ),
            image_mean=context.image_mean,
            image_std=context.image_std,
            pool=self.pool,
            temperature=self.temperature,
            max_scale=self.max_scale,
            identical_captions_match=self.identical_captions_match,
            labels_match=self.labels_match,
        )


def check_temperature(temperature: float, max_scale: float) -> None:
    """Raise ValueError for a first value at which a `Temperature` would not be learned."""
    if 1 / temperature > max_scale:
        raise ValueError(
            f"temperature ({temperature}) is below 1 / max_scale ({1 / max_scale:g}),"
            " where it would not be learned: raise one of them"
        )


def one_text_problems(where: str, task: Any, recipe: Any) -> list[str]:
    """What an objective cannot do that holds images and texts against each other, one text an
    image; arguments as of `ObjectiveSettings.problems`."""
    found, kind = [], task.objective.type
    if task.data.captions_per_image > 1:
        found.append(
            f"{where}.data.captions_per_image={task.data.captions_per_image} must be 1 for a "
            f"{kind} objective, whose images have one text each in a step"
        )
    if task.data.frames is not None:
        found.append(
            f"{where}.data.frames={task.data.frames}: a contrastive objective reads images: remove "
            "frames"
        )
    if task.data.copies > 1:
        found.append(
            f"{where}.data.repeats={task.data.copies} must be 1 for a {kind} objective, which "
            "would have to tell an image from its own copies"
        )
    name = task.objective.text_encoder
    encoder = recipe.model.encoders.get(name)
    longest = None if encoder is None else encoder.longest_text
    if longest is not None and task.data.text_length > longest:
        found.append(
            f"{where}.data.text_length={task.data.text_length} exceeds "
            f"model.encoders.{name}.max_positions={longest}: raise max_positions or lower "
            "text_length"
        )
    return found
