"""M3I pretraining (arXiv 2211.09807): settings; what they build is in `m3i_module`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.objectives.contrastive_settings import check_temperature
from pretrain.objectives.labels_match import LabelsMatch
from pretrain.objectives.loss_balance_settings import BalanceSettings
from pretrain.objectives.m3i_decoder_settings import DecoderSettings

if TYPE_CHECKING:
    from torch import nn

    from pretrain.objectives.m3i_module import M3I


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


class M3ISettings(Settings):
    """M3I: dense features, texts and classes, predicted from mixed images."""

    data_type: ClassVar[str] = "m3i"
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

    def build(
        self,
        encoders: Mapping[str, nn.Module],
        vocabulary: Any,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        classes: int | None,
        new_encoder: Callable[[str], nn.Module],
    ) -> M3I:
        """The objective for these encoders and the pixel statistics and classes of the data.

        new_encoder: name -> another module like the encoder of that name, without drop path.

        Raises ValueError: no encoder of that name, or one without dense features.
        """
        from pretrain.models.frozen import training_flops
        from pretrain.objectives.image_tokens import find_encoder
        from pretrain.objectives.m3i_module import M3I

        text = None if self.text_encoder is None else find_encoder(encoders, self.text_encoder)
        return M3I(
            settings=self,
            encoder=find_encoder(encoders, self.encoder),
            target_encoder=new_encoder(self.encoder),
            text_width=None if text is None else text.width,
            text_flops=None if text is None else training_flops(text, text.flops),
            classes=classes,
            image_mean=image_mean,
            image_std=image_std,
        )
