"""Image-text contrast (CLIP): each image must find its text in the global batch, and vice versa."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.contrastive.loss import caption_ids, contrastive_sums, match_classes
from pretrain.objectives.contrastive.settings import (  # noqa: F401
    ContrastiveSettings,
    check_temperature,
)
from pretrain.objectives.evaluation_mode import evaluating
from pretrain.objectives.image_tokens import (
    Pool,
    image_vectors,
)
from pretrain.objectives.objective import (
    Batch,
    CoupledObjective,
    Evaluation,
    EvaluationContext,
    Modules,
    Shares,
    Totals,
)
from pretrain.objectives.retrieval import gathered_recalls


class Temperature(nn.Module):
    """The learned factor on similarities, kept as a logarithm.

    A module of its own, so that ZeRO-3 finds the parameter wherever it is asked for. At the bound
    the gradient ends: the factor then stays there, as it does in CLIP for nearly all of a run.
    """

    def __init__(self, temperature: float, max_scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.initial_value = {"log_scale": -math.log(temperature)}
        self.largest = math.log(max_scale)

    def forward(self) -> Tensor:
        """1 / temperature, (1,) float32."""
        return self.log_scale.float().clamp(max=self.largest).exp()


class PairContrast(CoupledObjective):
    """Loss and retrieval of images and texts, whatever makes their vectors.

    A subclass gives `image_features`, `text_features`, `shared`, `readers` and `flops`.

    Args:
        identical_captions_match, labels_match: as in `ContrastiveSettings`.
    """

    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {
        name: ("pairs",) for name in ("loss", "image_to_text", "text_to_image", "temperature")
    }

    def __init__(
        self,
        identical_captions_match: bool = True,
        labels_match: Literal["prompts", "never"] | None = None,
    ) -> None:
        super().__init__()
        self.identical_captions_match = identical_captions_match
        self.labels_match = labels_match or ("prompts" if identical_captions_match else "never")

    def image_features(
        self,
        modules: Modules,
        images: Tensor,
        draws: SampleDraws | None = None,
        step_draws: StepDraws | None = None,
    ) -> Tensor:
        """images: (B, 3, H, W) uint8. Returns (B, width) float32 of unit length."""
        raise NotImplementedError

    def text_features(
        self, modules: Modules, tokens: Tensor, step_draws: StepDraws | None = None
    ) -> Tensor:
        """tokens: (B, T) int64. Returns (B, width) float32 of unit length."""
        raise NotImplementedError

    def readers(self, modules: Modules) -> list[nn.Module]:
        """The shared modules that are read."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pairs of a micro-batch; their global sum is `totals`."""
        return {"pairs": int(batch["valid"].sum())}

    def features(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """image, text: (B, width) float32 of unit length.

        batch: images (B, 3, H, W) uint8; tokens (B, 1, T) int64; draws of the images, if the
            encoder needs some.
        """
        step = batch.get("step_draws")
        return {
            "image": self.image_features(modules, batch["images"], batch.get("draws"), step),
            "text": self.text_features(modules, batch["tokens"][:, 0], step),
        }

    def targets(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """caption_id, match_class (B,) int64; valid (B,) bool.

        batch: tokens (B, 1, T) int64; loss_mask (B, 1, T) bool, True at words and EOS; prompt_class
            (B,) int64 as in `match_classes`; valid (B,) bool.
        """
        return {
            "caption_id": caption_ids(batch["tokens"][:, 0], batch["loss_mask"][:, 0]),
            "match_class": match_classes(batch, self.labels_match),
            "valid": batch["valid"],
        }

    def loss(
        self,
        features: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        totals: Totals,
    ) -> Shares:
        """This rank's share of the global batch's loss and metrics. A collective.

        totals: "pairs" of the global batch.

        Returns 0-dim float32 tensors; summed over ranks each is the mean over the pairs of the
        global batch. Only "loss" carries a gradient.
        """
        loss, image_hits, text_hits = contrastive_sums(
            **features, **targets, **shared, identical_match=self.identical_captions_match
        )
        pairs = torch.as_tensor(totals["pairs"], dtype=torch.float32, device=loss.device)
        pairs = pairs.clamp(min=1.0)
        mine = targets["valid"].sum()
        return {
            "loss": loss / pairs,
            "image_to_text": image_hits / pairs,
            "text_to_image": text_hits / pairs,
            "temperature": mine / (pairs * shared["scale"].detach()[0]),
        }

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Retrieval among all images of `loader` and all their texts, on all ranks.

        loader: batches as in training, with K texts per image, fewer where loss_mask is empty; row
            (B,) int64; at least one on every rank.

        The metrics are the recalls of `retrieval_recalls`, images, texts and temperature; there are
        no examples.
        """
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad(), evaluating(self, *self.readers(modules)):
            scale = self.shared(modules, None)["scale"].item()
            for batch in loader:
                parts.append(self._evaluation_features(modules, batch, context.device))
        metrics, images, texts = gathered_recalls(
            parts, context.reduce, context.device, self.identical_captions_match
        )
        counts = {"images": float(images), "texts": float(texts)}
        return Evaluation(metrics | counts | {"temperature": 1 / scale}, [])

    def _evaluation_features(
        self, modules: Modules, batch: Batch, device: torch.device
    ) -> dict[str, Tensor]:
        """Features of the valid images of a batch (image, row) and of their texts (text,
        caption_id, row_of), on the CPU."""
        tokens, mask, valid = batch["tokens"], batch["loss_mask"], batch["valid"]
        image = self.image_features(modules, batch["images"].to(device)).cpu()
        text = self.text_features(modules, tokens.flatten(0, 1).to(device)).cpu()
        present = (mask.any(dim=2) & valid[:, None]).flatten()
        row_of = batch["row"][:, None].expand(tokens.shape[:2]).flatten()
        return {
            "image": image[valid],
            "row": batch["row"][valid],
            "text": text[present],
            "caption_id": caption_ids(tokens, mask).flatten()[present],
            "row_of": row_of[present],
        }


class Contrastive(PairContrast):
    """Projections, temperature, loss and retrieval.

    Args:
        width: channels of the common space.
        encoder, text_encoder: names of the encoders that it reads.
        encoder_widths: channels of the image encoder's vector and of the text feature.
        encoder_flops: FLOPs, forward and backward: (height, width) -> of an image, length -> of a
            text.
        image_mean, image_std: per channel, in units of the full range.
        pool, temperature, max_scale, identical_captions_match, labels_match: as in
            `ContrastiveSettings`.
    """

    def __init__(
        self,
        width: int,
        *,
        encoder: str,
        text_encoder: str,
        encoder_widths: tuple[int, int],
        encoder_flops: tuple[Callable[[int, int], int], Callable[[int], int]],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        pool: Pool = "mean",
        temperature: float = 0.07,
        max_scale: float = 100.0,
        identical_captions_match: bool = True,
        labels_match: Literal["prompts", "never"] | None = None,
    ) -> None:
        super().__init__(identical_captions_match, labels_match)
        self.image_projection = _projection(encoder_widths[0], width)
        self.text_projection = _projection(encoder_widths[1], width)
        self.temperature = Temperature(temperature, max_scale)
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.encoder_flops = encoder_flops
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.pool: Pool = pool

    def shared(self, modules: Modules, draws: StepDraws) -> dict[str, Tensor]:
        """scale: (1,) float32, what similarities are multiplied by."""
        return {"scale": self.temperature()}

    def image_features(
        self,
        modules: Modules,
        images: Tensor,
        draws: SampleDraws | None = None,
        step_draws: StepDraws | None = None,
    ) -> Tensor:
        """images: (B, 3, H, W) uint8. Returns (B, width) float32 of unit length."""
        encoder = modules[self.encoder]
        pixels = normalise_pixels(images, self.image_mean, self.image_std, encoder.dtype)
        vectors = image_vectors(encoder, pixels, self.pool, draws)
        return F.normalize(self.image_projection(vectors).float(), dim=1)

    def text_features(
        self, modules: Modules, tokens: Tensor, step_draws: StepDraws | None = None
    ) -> Tensor:
        """tokens: (B, T) int64. Returns (B, width) float32 of unit length."""
        projected = self.text_projection(modules[self.text_encoder](tokens))
        return F.normalize(projected.float(), dim=1)

    def flops(self, batch: Batch) -> int:
        """Model FLOPs, forward and backward, that this micro-batch asks for.

        Padding, and the second forward pass over cached features, do not count.
        """
        of_image, of_text = self.encoder_flops
        each = of_image(*batch["images"].shape[-2:]) + of_text(batch["tokens"].shape[-1])
        # Not numel(): under ZeRO-3 a weight is empty outside of forward.
        for layer in (self.image_projection, self.text_projection):
            each += 3 * 2 * layer.in_features * layer.out_features
        return int(batch["valid"].sum()) * each

    def readers(self, modules: Modules) -> list[nn.Module]:
        """As of `PairContrast`."""
        return [modules[self.encoder], modules[self.text_encoder]]


def _projection(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.initial_std = {"weight": inputs**-0.5}
    return layer
