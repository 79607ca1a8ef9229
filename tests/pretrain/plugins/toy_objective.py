"""A whole objective in one file: each class has a vector, which belongs to no sample, and an image
is of the class whose vector is most like its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.build_context import BuildContext
from pretrain.models.pixels import normalise_pixels
from pretrain.objectives.evaluation_mode import evaluating, mean
from pretrain.objectives.objective import (
    Batch,
    Evaluation,
    EvaluationContext,
    Modules,
    Objective,
    Shares,
    Totals,
)
from pretrain.objectives.objective_settings import ObjectiveSettings


class ToyObjectiveSettings(ObjectiveSettings):
    data_type: ClassVar[str] = "toy_data"
    encoder_fields: ClassVar[dict[str, str]] = {"encoder": "images"}
    type: Literal["toy_objective"] = "toy_objective"
    encoder: str = "image"

    def build(self, context: BuildContext) -> "ToyObjective":
        width = context.encoders[self.encoder].width
        return ToyObjective(
            self.encoder, width, context.classes, context.image_mean, context.image_std
        )


@dataclass(frozen=True)
class ToyExample:
    row: int
    key: str
    said: str
    image: Tensor | None

    def drawn(self) -> tuple[np.ndarray, str] | None:
        if self.image is None:
            return None
        return self.image.permute(1, 2, 0).numpy(), self.said


class ToyObjective(Objective):
    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {"loss": ("labels",), "top1": ("labels",)}

    def __init__(self, encoder: str, width: int, classes: int, image_mean, image_std) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.image_mean, self.image_std = image_mean, image_std
        self.vectors = nn.Embedding(classes, width)

    def counts(self, batch: Batch) -> dict[str, int]:
        known = batch["labels"] != NO_LABEL
        return {"images": int(batch["valid"].sum()), "labels": int(known.sum())}

    def flops(self, batch: Batch) -> int:
        return int(batch["valid"].sum())

    def shared(self, modules: Modules, draws) -> dict[str, Tensor]:
        return {"classes": F.normalize(self.vectors(torch.arange(self.classes)).float(), dim=1)}

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        scores = self._scores(modules, batch["images"], shared)
        loss = F.cross_entropy(scores, batch["labels"], ignore_index=NO_LABEL, reduction="sum")
        right = (scores.argmax(1) == batch["labels"]).sum().float()
        labels = totals["labels"].clamp(min=1.0)
        return {"loss": loss / labels, "top1": right / labels}

    def _scores(self, modules, images: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        encoder = modules[self.encoder]
        pixels = normalise_pixels(images, self.image_mean, self.image_std, encoder.dtype)
        return 10 * F.normalize(encoder(pixels).mean(1).float(), dim=1) @ shared["classes"].T

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        right, counts, examples = 0, {"images": 0, "labels": 0}, []
        with torch.no_grad(), evaluating(self, modules[self.encoder]):
            shared = self.shared(modules, None)
            for batch in loader:
                best = self._scores(modules, batch["images"].to(context.device), shared).argmax(1)
                right += int((best.cpu() == batch["labels"]).sum())
                counts = {name: counts[name] + n for name, n in self.counts(batch).items()}
                examples += [
                    ToyExample(int(batch["row"][i]), batch["key"][i], str(int(best[i])), None)
                    for i in batch["valid"].nonzero()[:, 0].tolist()
                ]
        parts = context.reduce({"right": right, **counts})
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        metrics = {"top1": mean(total["right"], total["labels"]), "images": float(total["images"])}
        return Evaluation(metrics, examples)
