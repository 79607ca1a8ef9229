"""A whole kind of data in one file: whether a digit is even, and settings that classify it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from data_pipeline.samples.image_fields import ImageDataSettings, ImageProcessor
from data_pipeline.samples.labels import NO_LABEL
from data_pipeline.samples.members import bad
from data_pipeline.samples.sample_processor import column
from pretrain.models.build_context import BuildContext
from pretrain.objectives.classification import Classification
from pretrain.objectives.classification_settings import ClassificationSettings

NAMES = ["even", "odd"]


class ToyDataSettings(ImageDataSettings):
    """Images of digits; those of several digits have no class."""

    type: Literal["toy_data"] = "toy_data"

    def processor(self, tokenizer: Any, train: bool) -> "ToyProcessor":
        return ToyProcessor(self, train)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "classes": len(NAMES), "class_names": NAMES}


class ToyProcessor(ImageProcessor):
    @property
    def extensions(self) -> frozenset[str]:
        return super().extensions | {"cls"}

    def read(self, sample, rng_for) -> dict[str, Any]:
        digit = sample.members.get("cls", b"-1")
        if not digit.lstrip(b"-").isdigit():
            raise bad(sample, f"cls is not a number: {digit!r}")
        return {"label": int(digit) % 2 if int(digit) >= 0 else NO_LABEL}

    def stack(self, items, images) -> dict[str, Any]:
        return {"labels": column(items, "label", NO_LABEL)}


class ToyClassificationSettings(ClassificationSettings):
    """Classification behind a module that reads the encoder's tokens."""

    data_type: ClassVar[str] = "toy_data"
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images", "refiner": "tokens"}
    type: Literal["toy_classification"] = "toy_classification"
    refiner: str = "refiner"

    def build(self, context: BuildContext) -> "Refined":
        encoder, refiner = context.encoders[self.encoder], context.encoders[self.refiner]
        if list(context.class_names) != NAMES:
            raise ValueError(f"the data call their classes {list(context.class_names)}")

        def flops(height: int, width: int) -> int:
            tokens = height * width // encoder.patch**2
            return 3 * (encoder.flops(height, width) + refiner.flops(tokens))

        return Refined(
            context.classes,
            encoder=self.encoder,
            encoder_width=refiner.width,
            encoder_flops=flops,
            image_mean=context.image_mean,
            image_std=context.image_std,
            refiner=self.refiner,
        )


class Chain(nn.Module):
    """The encoder and what reads it, as one encoder; made for a call, and not kept."""

    def __init__(self, encoder: nn.Module, refiner: nn.Module) -> None:
        super().__init__()
        self.encoder, self.refiner, self.dtype = encoder, refiner, encoder.dtype

    def forward(self, pixels: Tensor, draws: Any = None) -> Tensor:
        return self.refiner(self.encoder(pixels, draws))


class Refined(Classification):
    def __init__(self, *args, refiner: str, **options) -> None:
        super().__init__(*args, **options)
        self.refiner = refiner

    def _chained(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {self.encoder: Chain(modules[self.encoder], modules[self.refiner])}

    def forward(self, modules: Mapping[str, nn.Module], *args, **options) -> dict[str, Tensor]:
        return super().forward(self._chained(modules), *args, **options)

    def evaluate(self, modules: Mapping[str, nn.Module], *args, **options):
        return super().evaluate(self._chained(modules), *args, **options)
