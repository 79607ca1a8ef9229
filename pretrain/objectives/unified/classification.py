"""Classification of images by the names of classes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.pixels import normalise_pixels
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.evaluation_mode import evaluating, mean
from pretrain.objectives.label_loss import label_losses, mixed_label_loss, of_larger_part
from pretrain.objectives.mixing import mix_pairs
from pretrain.objectives.objective import (
    Batch,
    Evaluation,
    EvaluationContext,
    Modules,
    Objective,
    Shares,
    Totals,
)
from pretrain.objectives.unified.parts import UnifiedParts, name_rows

_NAMES = ("cross_entropy", "top1", "top5")


class UnifiedClassification(Objective):
    """An image against the names of all classes.

    Args:
        parts: the shared modules. vocabulary: the tokenizer. class_names: in the order of their
            numbers. label_smoothing: share of the target spread evenly over all classes.
    """

    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {
        **{name: ("labels",) for name in ("loss", *_NAMES)},
        "labelled": ("images",),
    }

    def __init__(
        self,
        parts: UnifiedParts,
        vocabulary: Any,
        class_names: Sequence[str],
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if not class_names:
            raise ValueError("the data have no class_names, which images are compared with")
        self.parts, self.label_smoothing = parts, label_smoothing
        self.names = name_rows(vocabulary, class_names)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images and labelled images of a micro-batch."""
        labels = int((batch["labels"] != NO_LABEL).sum())
        return {"images": int(batch["valid"].sum()), "labels": labels}

    def shared(self, modules: Modules, draws: StepDraws | None) -> dict[str, Tensor]:
        """targets: (classes, width) of unit length; scale: (1,). A collective."""
        targets = self.parts.targets(modules, *self.names, "text", draws)
        return {"targets": targets, "scale": self.parts.scale(modules, "classification")}

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's share of the mean over the labelled images of the global batch; batch
        as of `Classification.losses`, neighbours mixed in the same way."""
        answers = {name: batch[name] for name in ("labels", "targets") if name in batch}
        logits, weights = self._logits(modules, batch, shared)
        loss = mixed_label_loss(logits, answers, weights, self.label_smoothing)
        labels, images = (
            torch.as_tensor(totals[name], dtype=torch.float32, device=loss.device).clamp(min=1.0)
            for name in ("labels", "images")
        )
        sums = self._sums(logits, of_larger_part(answers, weights))
        shares = {name: value / labels for name, value in zip(_NAMES, sums, strict=True)}
        known = (batch["labels"] != NO_LABEL).sum()
        return {"loss": loss / labels, **shares, "labelled": known / images}

    def _logits(
        self, modules: Modules, batch: Batch, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(B, classes) float32, and the partners' part in each image, if they are mixed."""
        parts, weights = self.parts, None
        dtype = modules[parts.image].dtype
        pixels = normalise_pixels(batch["images"], parts.image_mean, parts.image_std, dtype)
        if "mix_share" in batch:
            pixels, weights = mix_pairs(pixels, batch)
        part = parts.image_part(modules, pixels, "image", batch.get("draws"))
        vectors = parts.compared(modules, part, batch.get("step_draws"))
        return shared["scale"] * vectors @ shared["targets"].T, weights

    @torch.no_grad()
    def _sums(self, logits: Tensor, answers: Mapping[str, Tensor]) -> list[Tensor]:
        """Cross-entropy, and hits among the best and the best five, over labelled images."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == answers["labels"][:, None]
        found = label_losses(logits, **answers).sum(), hits[:, 0].sum(), hits.any(dim=1).sum()
        return [value.float() for value in found]

    def flops(self, batch: Batch) -> int:
        """Forward and backward, of the images alone."""
        size = batch["images"].shape[-2:]
        tokens = 1 + self.parts.image_tokens(*size)
        each = self.parts.image_flops(*size) + self.parts.decoder_flops(tokens)
        return int(batch["valid"].sum()) * each

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """top1, top5 and cross_entropy over the labelled images of all ranks, images and labelled;
        there are no examples."""
        sums, counts = torch.zeros(3, dtype=torch.float64), {"images": 0, "labels": 0}
        with torch.no_grad(), evaluating(self, *self.parts.all_of(modules)):
            shared = self.shared(modules, None)
            for batch in loader:
                names = ("images", "labels", "targets")
                moved = {n: batch[n].to(context.device) for n in names if n in batch}
                logits, _ = self._logits(modules, moved, shared)
                answers = {n: v for n, v in moved.items() if n != "images"}
                sums += torch.stack(self._sums(logits, answers)).double().cpu()
                counts = {name: counts[name] + n for name, n in self.counts(batch).items()}
        gathered = context.reduce({"sums": sums.tolist(), **counts})
        labels, images = (sum(p[name] for p in gathered) for name in ("labels", "images"))
        totals = {n: sum(p["sums"][i] for p in gathered) for i, n in enumerate(_NAMES)}
        metrics = {name: mean(totals[name], labels) for name in ("top1", "top5", "cross_entropy")}
        metrics |= {"images": float(images), "labelled": mean(labels, images)}
        return Evaluation(metrics, [])
