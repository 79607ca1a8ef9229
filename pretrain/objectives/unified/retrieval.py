"""Retrieval: each image among the texts of the global batch, and each text among its images."""

from torch import Tensor, nn

from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.contrastive.contrastive import PairContrast
from pretrain.objectives.objective import Batch, Modules
from pretrain.objectives.unified.parts import UnifiedParts


class UnifiedRetrieval(PairContrast):
    """Images and texts, each behind `<SPE>` through the decoder.

    Args:
        parts: the shared modules. identical_captions_match: as in `UnifiedRetrievalSettings`.
    """

    def __init__(self, parts: UnifiedParts, identical_captions_match: bool = True) -> None:
        super().__init__(identical_captions_match)
        self.parts = parts

    def shared(self, modules: Modules, draws: StepDraws | None) -> dict[str, Tensor]:
        """scale: (1,) float32."""
        return {"scale": self.parts.scale(modules, "retrieval")}

    def image_features(
        self,
        modules: Modules,
        images: Tensor,
        draws: SampleDraws | None = None,
        step_draws: StepDraws | None = None,
    ) -> Tensor:
        """As of `PairContrast`."""
        part = self.parts.image_part(modules, images, "image", draws)
        return self.parts.compared(modules, part, step_draws)

    def text_features(
        self, modules: Modules, tokens: Tensor, step_draws: StepDraws | None = None
    ) -> Tensor:
        """As of `PairContrast`."""
        part = self.parts.text_part(modules, tokens, "text")
        return self.parts.compared(modules, part, step_draws)

    def readers(self, modules: Modules) -> list[nn.Module]:
        """As of `PairContrast`."""
        return self.parts.all_of(modules)

    def flops(self, batch: Batch) -> int:
        """Forward and backward; padding, and the second forward pass, do not count."""
        size, length = batch["images"].shape[-2:], batch["tokens"].shape[-1]
        parts = self.parts
        image = parts.image_flops(*size) + parts.decoder_flops(1 + parts.image_tokens(*size))
        text = parts.text_flops(length) + parts.decoder_flops(1 + length)
        return int(batch["valid"].sum()) * (image + text)
