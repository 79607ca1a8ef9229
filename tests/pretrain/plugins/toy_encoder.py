"""A whole encoder of images in one file, and a module that reads what such an encoder makes."""

from collections.abc import Collection
from typing import ClassVar, Literal

from torch import Tensor, nn

from pretrain.models.build_context import BuildContext
from pretrain.models.encoder import Encoded, Encoder, Output
from pretrain.models.encoder_settings import EncoderSettings
from pretrain.models.sample_draws import SampleDraws


class ToyEncoderSettings(EncoderSettings):
    """Patches, and a linear layer on each."""

    reads: ClassVar[str] = "images"
    type: Literal["toy_encoder"] = "toy_encoder"
    width: int = 16
    patch: int = 8

    @property
    def size_multiple(self) -> int:
        return self.patch

    @property
    def pools(self) -> tuple[str, ...]:
        return ("mean",)

    def build(self, context: BuildContext) -> "ToyEncoder":
        return ToyEncoder(self.width, self.patch)


class ToyEncoder(Encoder):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        return self.norm(self.patches(images).flatten(2).transpose(1, 2))

    def encode(
        self, images: Tensor, want: Collection[Output], draws: SampleDraws | None = None, **_
    ) -> Encoded:
        self.unwanted(want, ("tokens",))
        return Encoded(tokens=self(images, draws))

    def flops(self, height: int, width: int, want: Output = "tokens") -> int:
        return 2 * 3 * height * width * self.width

    def layer_names(self) -> list[tuple[str, ...]]:
        return [("patches",), ("norm",)]


class ToyRefinerSettings(EncoderSettings):
    """A layer on the tokens of another encoder, which several tasks may share."""

    reads: ClassVar[str] = "tokens"
    encoder_fields: ClassVar[dict[str, str]] = {"of": "images"}
    type: Literal["toy_refiner"] = "toy_refiner"
    of: str = "image"

    def build(self, context: BuildContext) -> "ToyRefiner":
        return ToyRefiner(context.encoders[self.of].width)


class ToyRefiner(Encoder):
    """It is given the tokens, and does not keep the encoder that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, draws: SampleDraws | None = None) -> Tensor:
        return tokens + self.outer(self.inner(tokens).relu())

    def flops(self, tokens: int, want: Output = "tokens") -> int:
        return 4 * tokens * self.width**2

    def layer_names(self) -> list[tuple[str, ...]]:
        return [("inner",), ("outer",)]
