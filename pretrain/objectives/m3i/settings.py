"""M3I pretraining (arXiv 2211.09807): settings; what they build is in `module.py`."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.models.encoder_settings import multiple_problem
from pretrain.objectives.contrastive.settings import check_temperature, one_text_problems
from pretrain.objectives.labels_match import LabelsMatch
from pretrain.objectives.m3i.decoder_settings import DecoderSettings
from pretrain.objectives.m3i.loss_balance_settings import BalanceSettings
from pretrain.objectives.objective_settings import EnginePlan, ObjectiveSettings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.objectives.m3i.module import M3I


class LossWeights(Settings):
    """Factors of the four losses."""

    intra: float = Field(1.0, ge=0)
    """Of the hidden cells of the same view."""
    inter: float = Field(1.0, ge=0)
    """Of all cells of the other view."""
    text: float = Field(1.0, gt=0)
    """Of the softmax over the texts of the global batch, mean of both directions."""
    category: float = Field(1.0, gt=0)
    """Of the softmax over classes."""

    @model_validator(mode="after")
    def _check(self) -> LossWeights:
        if not self.intra and not self.inter:
            raise ValueError(
                "intra and inter are both 0, so that the dense targets teach nothing: use the "
                "objectives contrastive and classification"
            )
        return self


class M3ISettings(ObjectiveSettings):
    """M3I: dense features, texts and classes, predicted from mixed images."""

    data_type: ClassVar[str] = "m3i"
    pairs: ClassVar[bool] = True
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images", "text_encoder": "text"}
    type: Literal["m3i"] = "m3i"
    """Selects this objective among the kinds that a recipe may name."""
    encoder: str = "image"
    """Name of the encoder in `model.encoders` that is trained: a `vit`, or an `internimage` with
    `head: {type: projector}`."""
    text_encoder: str | None = "text"
    """Name of the encoder in `model.encoders` (of type `text`) that reads the texts; null: none are
    predicted."""
    cell: int = Field(32, gt=0)
    """Side in pixels of the cells that are mixed. A multiple of the ViT's patch, or of 32 for an
    InternImage (its last stride), and a divisor of the image's side."""
    group_attention: bool = False
    """Tokens of a ViT look only at those of their own image, as in MixMIM, and the class token only
    at itself; otherwise at all of the mixed image."""
    decoder: DecoderSettings = DecoderSettings()
    """Projector and predictor of dense features."""
    decorrelation: float = Field(0.02, ge=0)
    """Strength of the term that keeps dense targets apart (lambda of SiameseIM)."""
    center_targets: bool = True
    """Take the mean of the global batch off the targets before they are normalised: what batch
    norms do for SiameseIM. Without either, tokens soon have nearly all in common, since a direction
    that all share grows at the full learning rate of Adam."""
    weights: LossWeights = LossWeights()
    """Factors of the losses."""
    balance: BalanceSettings | None = None
    """Further factors, by gradient norms; null: none."""
    momentum_start: float = Field(0.995, ge=0, le=1)
    """Momentum of the target network at the beginning; it rises along half a cosine."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """Momentum at the end of the run."""
    pooled_width: int | None = Field(None, gt=0)
    """Channels of the vector that is compared with texts and classified, beside a ViT; null: 768.
    An InternImage has its own (`head.output`)."""
    temperature: float = Field(0.07, gt=0)
    """First value of the learned temperature of the text loss."""
    max_scale: float = Field(100.0, gt=1)
    """The inverse of the temperature is held at or below this."""
    labels_match: LabelsMatch = "prompts"
    """Between which texts a class makes a match, so that an image may find any text of its class
    (UniCL): `prompts`, those that were made from class names (a source with `class_names`) of the
    same name; `always`, all whose images have the same label, so that what a caption says beyond
    the class is not learned; `never`. Equal texts match in any case."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a class target that is spread evenly over all classes."""
    evaluation_references: int = Field(5, ge=1)
    """Texts of each held-out image that retrieval uses, at most."""

    @model_validator(mode="after")
    def _check(self) -> M3ISettings:
        check_temperature(self.temperature, self.max_scale)
        return self

    @property
    def uses_head(self) -> bool:
        """A projector pools its vectors, where the encoder has one."""
        return True

    @property
    def unread_targets(self) -> frozenset[str]:
        """As of `ObjectiveSettings`."""
        return frozenset({"text"} if self.text_encoder is None else ())

    def held_out_changes(self) -> dict[str, Any]:
        """Retrieval has several texts an image."""
        return {"captions_per_image": self.evaluation_references}

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """Texts as of contrast; images divide into cells, and cells into what the encoder cannot
        take apart."""
        found = one_text_problems(where, task, recipe) + self._without_losses(where, task)
        encoder = recipe.model.encoders.get(self.encoder)
        if encoder is None or encoder.reads != "images":
            return found
        key = f"{where}.objective.cell"
        needs = f"model.encoders.{self.encoder} needs"
        found += multiple_problem(key, self.cell, encoder.smallest_cell, needs)
        for path, image in task.images(where).items():
            for size in {image.size, *(image.sizes or ())}:
                needs = f"{key}={self.cell} needs"
                found += multiple_problem(f"{path}.size", size, self.cell, needs)
        image = task.data.image  # and the second view: of the same sizes
        if self.cell in {image.size, *(image.sizes or ())}:
            found.append(
                f"{key}={self.cell} is all of an image, but two share the cells: lower cell, or "
                f"take a larger {where}.data.image.size"
            )
        if task.evaluation is not None:
            found += self._evaluation(where, task)
        return found + self._encoder(f"{where}.objective", encoder)

    def _encoder(self, where: str, encoder: Any) -> list[str]:
        """The encoder gives vectors of cells, and what is set of it is for one of its kind."""
        if encoder.groups_cells:
            return []
        found = []
        if encoder.cells_problem is not None:
            found.append(
                f"{where} reads dense features of model.encoders.{self.encoder}, "
                f"{encoder.cells_problem}"
            )
        for field, free in (("group_attention", False), ("pooled_width", None)):
            if getattr(self, field) != free:
                found.append(f"{where}.{field} is for a vit, not for an {encoder.type}: remove it")
        return found

    def _without_losses(self, where: str, task: Any) -> list[str]:
        """Settings of losses that are not there."""
        absent = []
        if self.text_encoder is None:
            fields = {
                "weights.text": self.weights.text,
                "temperature": self.temperature,
                "max_scale": self.max_scale,
            }
            absent.append((f"{where}.objective.text_encoder", fields))
        if task.data.classes is None:
            fields = {
                "weights.category": self.weights.category,
                "label_smoothing": self.label_smoothing,
            }
            absent.append((f"{where}.data.classes", fields))
        plain = type(self)()
        return [
            f"{where}.objective.{field}={value} has no effect with {key}=null: remove it, or set "
            f"{key}"
            for key, fields in absent
            for field, value in fields.items()
            if value != operator.attrgetter(field)(plain)
        ]

    def _evaluation(self, where: str, task: Any) -> list[str]:
        found, image = [], task.data.held_out_image(task.evaluation.image)
        if (size := task.evaluation.micro_batch or task.micro_batch) % 2:
            found.append(
                f"{where}.evaluation.micro_batch={size} must be even: m3i mixes neighbours"
            )
        if (image.size, image.fixed_size) != (task.data.image.size, True):
            found.append(
                f"{where}.evaluation.image must give squares of {where}.data.image.size="
                f"{task.data.image.size}, on whose grid the second view is predicted"
            )
        return found

    def engine_problems(self, where: str, task: Any, engine: EnginePlan) -> list[str]:
        """Where the gradient at an encoder's output, which `balance` measures, is not to be had."""
        found, key = [], f"{where}.objective.balance"
        if self.balance is None:
            return found
        if engine.stage == 3:
            found.append(
                f"{engine.file}: zero_optimization.stage=3 frees weights that {key} needs "
                f"for its own backward pass: take zero1 or zero2, or set {key}=null"
            )
        if engine.precision == "fp16":
            found.append(
                f"precision=fp16: {key} measures gradients without the loss scale, and "
                f"fp16 rounds them to 0: take bf16 or fp32, or set {key}=null"
            )
        if engine.micro_steps > 1:
            found.append(
                f"{key} needs the batch of a rank in one micro-step, but "
                f"{where}.global_batch={task.global_batch} is {engine.micro_steps} of "
                f"{where}.micro_batch={task.micro_batch} on {engine.world} rank(s): raise "
                f"micro_batch, or set {key}=null"
            )
        return found

    def build(self, context: BuildContext) -> M3I:
        """The objective for the context's encoders and the pixel statistics and classes of the
        data.

        Raises ValueError: no encoder of that name, or one without dense features.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.image_tokens import find_encoder
        from pretrain.objectives.m3i.module import M3I

        text = (
            None if self.text_encoder is None else find_encoder(context.encoders, self.text_encoder)
        )
        return M3I(
            settings=self,
            encoder=find_encoder(context.encoders, self.encoder),
            target_encoder=context.new_encoder(self.encoder),
            text_width=None if text is None else text.width,
            text_flops=None if text is None else training_flops(text, text.flops),
            classes=context.classes,
            image_mean=context.image_mean,
            image_std=context.image_std,
        )
