"""Settings of the unified objectives, which need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pretrain.objectives.contrastive.settings import one_text_problems
from pretrain.objectives.objective_settings import ObjectiveSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.objectives.unified.caption import UnifiedCaption
    from pretrain.objectives.unified.classification import UnifiedClassification
    from pretrain.objectives.unified.mlm import UnifiedMlm
    from pretrain.objectives.unified.parts import UnifiedParts
    from pretrain.objectives.unified.retrieval import UnifiedRetrieval


class UnifiedSettings(ObjectiveSettings):
    """Base: a task as the cosine of an input and its targets, by modules that all tasks share."""

    text_encoder: str = "text"
    """Name of the encoder in `model.encoders` (of type `bert`) that reads texts and targets."""
    decoder: str = "general"
    """Name of the module in `model.encoders` (of type `general_decoder`) that all tasks share."""

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        encoders = recipe.model.encoders
        decoder, text = encoders.get(self.decoder), encoders.get(self.text_encoder)
        found = []
        if text is not None and text.type != "bert":
            found.append(
                f"{where}.objective.text_encoder={self.text_encoder!r} is of type {text.type}, "
                "which reads no text from left to right and in both directions: use type=bert"
            )
        for field in self.encoder_fields:
            name = getattr(self, field)
            width, wanted = (getattr(encoders.get(n), "width", None) for n in (name, self.decoder))
            if decoder is not None and None not in (width, wanted) and width != wanted:
                found.append(
                    f"model.encoders.{name}.width={width} is not that of "
                    f"model.encoders.{self.decoder}, {wanted}: make them equal"
                )
        return found

    def parts(self, context: BuildContext) -> UnifiedParts:
        """The shared modules, by name. Raises ValueError: one is not there, or does not fit."""
        from pretrain.objectives.unified.parts import UnifiedParts

        image = getattr(self, "encoder", None)
        return UnifiedParts.of(context, image, self.text_encoder, self.decoder)


class UnifiedClassificationSettings(UnifiedSettings):
    """Classification of images by the names of classes (`class_names` of the data)."""

    data_type: ClassVar[str] = "labels"
    encoder_fields: ClassVar[dict[str, str]] = {
        "encoder": "images",
        "text_encoder": "text",
        "decoder": "features",
    }
    type: Literal["unified_classification"] = "unified_classification"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` that reads the images."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        found = super().problems(where, task, recipe)
        if not task.data.class_names:
            found.append(
                f"{where}.data.class_names: {self.type} compares images with the names of "
                "classes: list them in the order of their numbers"
            )
        if task.data.further_views:
            found.append(
                f"{where}.data.smaller_views: {self.type} reads one size of an image: remove them"
            )
        return found

    def build(self, context: BuildContext) -> UnifiedClassification:
        """The objective for the context's encoders, tokenizer, pixel statistics and class names.

        Raises ValueError: as `parts`, or classes have no names.
        """
        from pretrain.objectives.unified.classification import UnifiedClassification

        return UnifiedClassification(
            self.parts(context), context.vocabulary, context.class_names, self.label_smoothing
        )


class UnifiedRetrievalSettings(UnifiedSettings):
    """Retrieval between images and captions over the global batch."""

    data_type: ClassVar[str] = "captions"
    encoder_fields: ClassVar[dict[str, str]] = UnifiedClassificationSettings.encoder_fields
    type: Literal["unified_retrieval"] = "unified_retrieval"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` that reads the images."""
    identical_captions_match: bool = True
    """Equal captions in a batch are matches of each other's images."""
    evaluation_references: int = Field(5, ge=1)
    """Captions of each held-out image that retrieval uses, at most."""

    def held_out_changes(self) -> dict[str, Any]:
        """Retrieval has several texts an image."""
        return {"captions_per_image": self.evaluation_references}

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        found = super().problems(where, task, recipe)
        return found + one_text_problems(where, task, recipe)

    def build(self, context: BuildContext) -> UnifiedRetrieval:
        """The objective for the context's encoders and pixel statistics. Raises ValueError: as
        `parts`."""
        from pretrain.objectives.unified.retrieval import UnifiedRetrieval

        return UnifiedRetrieval(self.parts(context), self.identical_captions_match)


class UnifiedCaptionSettings(UnifiedSettings):
    """Captioning: each word is sought among all words of the vocabulary."""

    data_type: ClassVar[str] = "captions"
    writes_texts: ClassVar[bool] = True
    encoder_fields: ClassVar[dict[str, str]] = UnifiedClassificationSettings.encoder_fields
    type: Literal["unified_caption"] = "unified_caption"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` that reads the images."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over the words that are not the label."""
    max_new_tokens: int = Field(40, gt=0)
    """Longest caption that generation writes, in tokens, EOS counted."""

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        found = super().problems(where, task, recipe)
        encoders = recipe.model.encoders
        limits = {
            f"model.encoders.{self.decoder}.max_queries": getattr(
                encoders.get(self.decoder), "max_queries", None
            ),
            f"model.encoders.{self.text_encoder}.max_positions": getattr(
                encoders.get(self.text_encoder), "max_positions", None
            ),
        }
        lengths = {
            f"{where}.data.text_length": task.data.text_length,
            f"{where}.objective.max_new_tokens": self.max_new_tokens,
        }
        found += [
            f"{key}={length} exceeds {limit}={most}: raise {limit.rpartition('.')[2]} or lower "
            f"{key.rpartition('.')[2]}"
            for key, length in lengths.items()
            for limit, most in limits.items()
            if most is not None and length > most
        ]
        if task.data.frames is not None:
            found.append(f"{where}.data.frames: {self.type} reads images: remove frames")
        return found

    def build(self, context: BuildContext) -> UnifiedCaption:
        """The objective for the context's encoders, tokenizer and pixel statistics. Raises
        ValueError: as `parts`."""
        from pretrain.objectives.unified.caption import UnifiedCaption

        return UnifiedCaption(
            self.parts(context), context.vocabulary, self.label_smoothing, self.max_new_tokens
        )


class UnifiedMlmSettings(UnifiedSettings):
    """Masked words, sought among all words of the vocabulary. Tokens are masked one by one, and not
    by whole words."""

    data_type: ClassVar[str] = "text"
    encoder_fields: ClassVar[dict[str, str]] = {"text_encoder": "text", "decoder": "features"}
    type: Literal["unified_mlm"] = "unified_mlm"
    """Selects this objective among the kinds that a recipe may name."""
    share: float = Field(0.15, gt=0, lt=1)
    """Share of a row's tokens that are to be predicted: rounded, at least one. Of them 80 % are
    masked, 10 % are other words, 10 % stay."""

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """As of `ObjectiveSettings`."""
        found = super().problems(where, task, recipe)
        text = recipe.model.encoders.get(self.text_encoder)
        longest = None if text is None else text.longest_text
        if longest is not None and task.data.text_length > longest:
            found.append(
                f"{where}.data.text_length={task.data.text_length} exceeds model.encoders."
                f"{self.text_encoder}.max_positions={longest}: raise max_positions or lower "
                "text_length"
            )
        return found

    def build(self, context: BuildContext) -> UnifiedMlm:
        """The objective for the context's encoders and tokenizer. Raises ValueError: as `parts`."""
        from pretrain.objectives.unified.mlm import UnifiedMlm

        return UnifiedMlm(self.parts(context), context.vocabulary, self.share)
