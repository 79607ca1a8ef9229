"""Classification: a linear layer on one vector per image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.samples.labels import NO_LABEL, smaller_view_name
from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.classification_settings import (  # noqa: F401
    ClassificationSettings,
)
from pretrain.objectives.evaluation_mode import evaluating, mean
from pretrain.objectives.image_tokens import (
    Pool,
    image_vectors,
)
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
from pretrain.objectives.resolutions import resized, scale_consistency, scaled_shapes

_TOP = 5


class Classification(Objective):
    """Head, loss and evaluation of classification.

    Args:
        classes: number of classes.
        encoder: name of the encoder that it reads.
        encoder_width: channels of what the encoder hands over.
        encoder_flops: (height, width) -> FLOPs, forward and backward, for one image.
        image_mean, image_std: per channel, in units of the full range.
        pool, label_smoothing, head_std, smaller_sizes, consistency: as in `ClassificationSettings`.
        smaller_views: sizes of the further views that batches bring, in place of `smaller_sizes`.

    Sizes are passes: each has a forward and a backward pass of its own, so that a step takes the
    memory of the largest. Only vectors of the next larger size go on to a smaller one.
    """

    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {
        **{name: ("labels",) for name in ("loss", "cross_entropy", "top1", "top5")},
        "labelled": ("images",),
    }

    def __init__(
        self,
        classes: int,
        *,
        encoder: str,
        encoder_width: int,
        encoder_flops: Callable[[int, int], int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        pool: Pool = "mean",
        label_smoothing: float = 0.1,
        head_std: float = 0.02,
        smaller_sizes: Sequence[int] = (),
        smaller_views: Sequence[int] = (),
        consistency: float = 1.0,
    ) -> None:
        super().__init__()
        if smaller_sizes and smaller_views:
            raise ValueError(
                "smaller_sizes and the data's smaller_views are two ways to the same: remove one"
            )
        self.head = nn.Linear(encoder_width, classes)
        self.head.initial_std = {"weight": head_std, "bias": 0.0}  # for `models.init`
        self.encoder = encoder
        self.encoder_flops = encoder_flops
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.pool: Pool = pool
        self.label_smoothing = label_smoothing
        self.smaller_sizes = tuple(smaller_sizes)
        self.smaller_views = tuple(smaller_views)
        self.consistency = consistency

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images and labelled images of a micro-batch; their global sums are `totals`."""
        return {
            "images": int(batch["valid"].sum()),
            "labels": int((batch["labels"] != NO_LABEL).sum()),
        }

    def passes(self, batch: Batch) -> int:
        """One for each size of this micro-batch's images."""
        return len(self._shapes(batch))

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's share of the global batch's loss and metrics, all passes in one graph.

        batch: images (B, 3, H, W) uint8; labels (B,) int64, NO_LABEL where there is none; draws of
        the images, if the encoder needs some. With targets (B, classes) float32, probabilities,
        both cross-entropies are with those, and labels are what hits are counted by. With mix_share
        and mix_box neighbours are mixed (`mix_pairs`): the loss is that of both labels by their
        shares, the other metrics judge an image by the label of its larger part.
        totals: "images" and "labels" of the global batch.

        Returns 0-dim float32 tensors; summed over all micro-batches and ranks each is the mean over
        the labelled images of the global batch, `labelled` their part of all its images. Only
        "loss" carries a gradient: of zero, but through the head, where nothing is labelled.
        """
        sums: Shares = {}
        carried = None
        for number in range(self.passes(batch)):
            shares = self.losses_in_pass(modules, batch, totals, shared, number, carried)
            carried = shares.pop("carried", None)
            sums |= {name: sums.get(name, 0.0) + value for name, value in shares.items()}
        return sums

    def losses_in_pass(
        self,
        modules: Modules,
        batch: Batch,
        totals: Totals,
        shared: Mapping[str, Tensor],
        number: int,
        carried: Tensor | None,
    ) -> Shares:
        """`losses` of one size; metrics are those of the first, the largest.

        carried: vectors of the next larger size. A pass that is followed by another returns its
        own under that name.
        """
        pixels, weights = self._images(modules, batch, number)
        vectors = image_vectors(modules[self.encoder], pixels, self.pool, batch.get("draws"))
        logits = self.head(vectors).float()
        answers = {name: batch[name] for name in ("labels", "targets") if name in batch}
        loss = mixed_label_loss(logits, answers, weights, self.label_smoothing)
        known = batch["labels"] != NO_LABEL
        if carried is not None:
            loss = loss + self.consistency * scale_consistency(vectors, carried, known)
        labels, images = (
            torch.as_tensor(totals[name], dtype=torch.float32, device=loss.device).clamp(min=1.0)
            for name in ("labels", "images")
        )
        passes = self.passes(batch)
        shares = {"loss": loss / labels / passes}
        if number == 0:
            _, *sums = self.label_sums(logits, **of_larger_part(answers, weights))
            names = ("cross_entropy", "top1", "top5")
            shares |= {name: value / labels for name, value in zip(names, sums, strict=True)}
            shares["labelled"] = known.sum() / images
        if number + 1 < passes and self.consistency:
            shares["carried"] = vectors.detach()
        return shares

    def label_sums(
        self, logits: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Smoothed loss, cross-entropy, and hits among the best and the best five, summed over
        labelled images.

        logits: (B, classes) float32; labels: (B,) int64; targets: (B, classes) float32, None: all
        of the labels. Returns four 0-dim float32 tensors; the first carries a gradient.
        """
        loss = label_losses(logits, labels, targets, self.label_smoothing).sum()
        with torch.no_grad():
            cross_entropy = label_losses(logits, labels, targets).sum()
            best = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
            hits = best == labels[:, None]
        return loss, cross_entropy, hits[:, 0].sum().float(), hits.any(dim=1).sum().float()

    def flops(self, batch: Batch) -> int:
        """Model FLOPs, forward and backward, that this micro-batch asks for; padding is free."""
        images = int(batch["valid"].sum())
        head = 2 * self.head.in_features * self.head.out_features
        return images * sum(self.encoder_flops(*s) + 3 * head for s in self._shapes(batch))

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Classify every image of `loader`.

        The metrics are top1, top5, loss and cross_entropy over the labelled images of all ranks,
        images and labelled (as in `losses`); there are no examples.
        """
        names = ("loss", "cross_entropy", "top1", "top5")
        sums = torch.zeros(len(names), dtype=torch.float64)
        counts = {"images": 0, "labels": 0}
        with torch.no_grad(), evaluating(self, modules[self.encoder]):
            for batch in loader:
                pixels = self._pixels(modules, batch["images"].to(context.device))
                logits = self.logits(modules, pixels, None)
                answers = [batch["labels"], batch.get("targets")]
                answers = [None if a is None else a.to(context.device) for a in answers]
                found = torch.stack(self.label_sums(logits, *answers))
                sums += found.double().cpu()
                counts = {name: counts[name] + n for name, n in self.counts(batch).items()}
        parts = context.reduce({"sums": sums.tolist(), **counts})
        labels = sum(part["labels"] for part in parts)
        images = sum(part["images"] for part in parts)
        metrics = {
            name: mean(sum(part["sums"][names.index(name)] for part in parts), labels)
            for name in ("top1", "top5", "loss", "cross_entropy")
        }
        metrics |= {"images": float(images), "labelled": mean(labels, images)}
        return Evaluation(metrics, [])

    def _shapes(self, batch: Batch) -> list[tuple[int, int]]:
        """(height, width) of the images of each pass."""
        first = tuple(batch["images"].shape[-2:])
        if self.smaller_views:
            return [first, *((size, size) for size in self.smaller_views)]
        return scaled_shapes(*first, self.smaller_sizes)

    def _images(self, modules: Modules, batch: Batch, number: int) -> tuple[Tensor, Tensor | None]:
        """Normalised images of a pass, and the partners' part in each, (B,), if they are mixed."""
        name = "images"
        if number and self.smaller_views:
            name = smaller_view_name(self.smaller_views[number - 1])
        pixels, weights = self._pixels(modules, batch[name]), None
        if "mix_share" in batch:
            pixels, weights = mix_pairs(pixels, batch)
        if number and not self.smaller_views:
            pixels = resized(pixels, self._shapes(batch)[number])
        return pixels, weights

    def _pixels(self, modules: Modules, images: Tensor) -> Tensor:
        dtype = modules[self.encoder].dtype
        return normalise_pixels(images, self.image_mean, self.image_std, dtype)

    def logits(self, modules: Modules, pixels: Tensor, draws: SampleDraws | None) -> Tensor:
        """(B, classes) float32."""
        vectors = image_vectors(modules[self.encoder], pixels, self.pool, draws)
        return self.head(vectors).float()
