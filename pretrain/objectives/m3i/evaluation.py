"""Held-out evaluation of M3I: its losses, and what whole images are good for."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.contrastive.loss import caption_ids
from pretrain.objectives.evaluation_mode import Gather, evaluating, mean
from pretrain.objectives.m3i.collapse import warn_of_collapse
from pretrain.objectives.m3i.decorrelation import Moments, effective_rank, target_deviation
from pretrain.objectives.m3i.loss import COUNTED_BY, count_targets, m3i_losses
from pretrain.objectives.objective import Batch, Modules
from pretrain.objectives.retrieval import gathered_recalls


class Evaluated(Protocol):
    """What is asked of an M3I: see `module.M3I`."""

    encoder: str
    text_encoder: str | None
    head: nn.Module | None
    settings: Any

    def encode(self, modules: Modules, batch: Batch, draws: Any):
        """Features of mixed images, and the encoder's output."""

    def targets_of(self, batch: Batch, draws: Any) -> dict[str, Tensor]:
        """What they are held against."""

    def shared(self, modules: Modules, draws: Any) -> dict[str, Tensor]:
        """What belongs to no image."""

    def image_vectors(self, modules: Modules, images: Tensor) -> Tensor:
        """One vector for each whole image."""

    def class_logits(self, modules: Modules, vectors: Tensor) -> Tensor:
        """Logits of the classes, from such vectors."""

    def text_features(self, modules: Modules, tokens: Tensor) -> Tensor:
        """One vector for each text."""


def evaluate_m3i(
    objective: Evaluated,
    modules: Modules,
    loader: Iterable[Batch],
    device: torch.device,
    reduce: Gather,
) -> dict[str, float | None]:
    """Metrics of all images of `loader`, the same on every rank; None where nothing was counted.

    loader: batches as in training, with K texts per image, the first view without
        augmentation; position and row (B,) int64. Equally many, and at least one, on every rank.

    Returns, of whole images, top1 and the recalls of `retrieval_recalls` among those with texts.
    Then intra, inter, text, category: losses of mixed images as in training, masks keyed by
    position; effective_rank and target_std of the dense targets. Texts are told apart, and targets
    centred, within a batch of all ranks, so that these depend on its size. Images, labelled, texts.
    """
    used = [modules[name] for name in (objective.encoder, objective.text_encoder) if name]
    tally, parts = _Tally(), []
    with torch.no_grad(), evaluating(objective, *used):
        for batch in loader:
            on_device = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in batch.items()
            }
            counts = reduce(count_targets(batch))
            totals = {name: sum(own[name] for own in counts) for name in counts[0]}
            tally.add_losses(*_losses(objective, modules, on_device, totals), totals)
            vectors = objective.image_vectors(modules, on_device["images"])
            if objective.head is not None:
                best = objective.class_logits(modules, vectors).argmax(dim=1)
                hits = (best == on_device["labels"]) & (on_device["labels"] != NO_LABEL)
                tally.hits += int(hits.sum())
            if objective.text_encoder is not None:
                parts.append(_texts_and_images(objective, modules, on_device, vectors))
    metrics = tally.metrics(reduce, objective)
    top1 = {name: metrics.pop(name) for name in ("top1",) if name in metrics}
    if not parts:
        return top1 | metrics
    recalls, _, texts = gathered_recalls(parts, reduce, device, identical_match=True)
    return top1 | recalls | metrics | {"texts": float(texts)}


def _losses(
    objective: Evaluated,
    modules: Modules,
    batch: Batch,
    totals: Mapping[str, int],
) -> tuple[dict[str, Tensor], Moments]:
    """This rank's shares for one batch of all ranks, and the moments of the targets."""
    draws = SampleDraws(0, "m3i evaluation", batch["position"])
    features, _ = objective.encode(modules, batch, draws)
    features |= objective.targets_of(batch, draws) | objective.shared(modules, StepDraws(0, "", 0))
    known = {
        name: torch.tensor(float(value), device=features["target"].device)
        for name, value in totals.items()
    }
    settings = objective.settings
    losses, _, moments = m3i_losses(
        features, known, settings.decorrelation, settings.label_smoothing, settings.center_targets
    )
    return losses, moments


def _texts_and_images(
    objective: Evaluated, modules: Modules, batch: Batch, vectors: Tensor
) -> dict[str, Tensor]:
    """What `gathered_recalls` reads, of the valid images that have texts, on the CPU."""
    tokens, mask = batch["tokens"], batch["loss_mask"]
    present = mask.any(dim=2) & batch["valid"][:, None]
    has = present.any(dim=1)
    text = objective.text_features(modules, tokens.flatten(0, 1))
    image = nn.functional.normalize(vectors.float(), dim=1)
    row_of = batch["row"][:, None].expand(present.shape)
    found = {
        "image": image[has],
        "row": batch["row"][has],
        "text": text[present.flatten()],
        "caption_id": caption_ids(tokens, mask)[present],
        "row_of": row_of[present],
    }
    return {name: value.cpu() for name, value in found.items()}


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.hits = 0
        self.moments: Moments | None = None

    def add_losses(
        self, losses: Mapping[str, Tensor], moments: Moments, totals: Mapping[str, int]
    ) -> None:
        """Take in a batch; each mean weighs by what it counts, and moments by images."""
        for kind, value in losses.items():
            weighed = float(value) * totals[COUNTED_BY[kind]]
            self.losses[kind] = self.losses.get(kind, 0.0) + weighed
        for name, count in totals.items():
            self.counts[name] = self.counts.get(name, 0) + count
        images = moments.mean.new_tensor([totals["intra"], totals["inter"]])
        weighed = [images[:, None] * moments.mean, images[:, None, None] * moments.correlation]
        before = [0.0, 0.0] if self.moments is None else self.moments
        self.moments = Moments(*(old + new for old, new in zip(before, weighed, strict=True)))

    def metrics(self, reduce: Gather, objective: Evaluated) -> dict[str, float | None]:
        """Means over all ranks."""
        parts = reduce({"losses": self.losses, "hits": self.hits})
        found = {
            kind: mean(sum(part["losses"][kind] for part in parts), self.counts[COUNTED_BY[kind]])
            for kind in self.losses
        }
        if self.counts["images"]:
            found |= self._spread()
        images, labels = self.counts["images"], self.counts["labels"]
        found |= {"images": float(images)}
        if objective.head is not None:
            hits = sum(part["hits"] for part in parts)
            found |= {"top1": mean(hits, labels), "labelled": mean(labels, images)}
        return found

    def _spread(self) -> dict[str, float]:
        images = self.moments.mean.new_tensor([self.counts["intra"], self.counts["inter"]])
        images = images.clamp(min=1.0)
        means = Moments(
            self.moments.mean / images[:, None], self.moments.correlation / images[:, None, None]
        )
        shares = images / images.sum()
        rank = float(effective_rank(means, shares))
        deviation = float(target_deviation(means, shares))
        warn_of_collapse(rank, deviation, means.mean.shape[1])
        return {"effective_rank": rank, "target_std": deviation}
