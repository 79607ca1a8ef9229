"""M3I pretraining (arXiv 2211.09807): one pass over two mixed images, four targets.

The authors have released no training code. What is certain is figure 1 of the paper and what the
loader of InternImage's weights gives away (names of modules, the head); geometry, decoder and loss
of dense targets are those of SiameseIM (arXiv 2206.01204), by the same authors. The rest is ours.

Rows 2i and 2i + 1 of a batch are mixed cell by cell, under complementary masks, into one image, and
the encoder reads that. From its own cells, each of the two must then predict

    dense features of all of itself (rows 2i) or of another view of itself (rows 2i + 1), as a
    momentum copy of encoder and projector sees them;
    the text that belongs to it, among all texts of the global batch;
    its class.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.collapse import CollapseWatch
from pretrain.objectives.contrastive import Temperature
from pretrain.objectives.contrastive_loss import caption_ids, match_classes
from pretrain.objectives.decorrelation import effective_rank, target_deviation
from pretrain.objectives.evaluation_mode import Gather, alone
from pretrain.objectives.loss_balance import LossBalance
from pretrain.objectives.m3i_decoder import Predictor, Projector
from pretrain.objectives.m3i_evaluation import evaluate_m3i
from pretrain.objectives.m3i_heads import MeanPool, ProjectorPool, SourceMark, TargetBranch
from pretrain.objectives.m3i_loss import KINDS, count_targets, counted_by, m3i_losses
from pretrain.objectives.pair_masks import (
    check_pairs,
    gather_own,
    mix_pixels,
    on_grid,
    own_tokens,
    pair_masks,
)
from pretrain.objectives.view_positions import relative_positions
from pretrain.optim.momentum import MomentumTargets

if TYPE_CHECKING:
    from pretrain.objectives.m3i import M3ISettings


class M3I(nn.Module):
    """Heads, target branch, losses and evaluation of M3I.

    Args:
        settings: see `M3ISettings`.
        encoder: the encoder that `forward` will be given as `settings.encoder`; not kept.
        target_encoder: another one of the same shape.
        text_width: of the text encoder; text_flops: of it, forward and backward; None without one.
        classes: number of classes; None: no classes are predicted.
        image_mean, image_std: per channel, in units of the full range.
    """

    couples_samples = True
    shared_features = ("scale",)
    constant_features = ("target",)

    def __init__(
        self,
        settings: "M3ISettings",
        *,
        encoder: nn.Module,
        target_encoder: nn.Module,
        text_width: int | None,
        text_flops: Callable[[int], int] | None,
        classes: int | None,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.settings, self.encoder, self.text_encoder = (
            settings, settings.encoder, settings.text_encoder
        )
        width = encoder.grid("cells").width
        self.mark = SourceMark(encoder.grid("stem").width)
        self.projector = Projector(width, settings.decoder)
        self.predictor = Predictor(settings.decoder)
        self.target = TargetBranch(target_encoder, Projector(width, settings.decoder))
        if encoder.pools_cells:
            if settings.pooled_width is not None:
                raise ValueError(
                    f"pooled_width={settings.pooled_width}: an InternImage has its own, "
                    "head.output; set pooled_width to null"
                )
            self.pool, pooled = ProjectorPool(), encoder.pooled_width
        else:
            pooled = settings.pooled_width or 768
            self.pool = MeanPool(width, pooled)
        if text_width is not None:
            self.text_projection = nn.Linear(text_width, pooled, bias=False)
            self.text_projection.initial_std = {"weight": text_width**-0.5}
            self.temperature = Temperature(settings.temperature, settings.max_scale)
        self.head = None if classes is None else nn.Linear(pooled, classes)
        if self.head is not None:
            # Logits of about 1: with 0.02 classes send a fifth of the gradient that texts send, and
            # stay at chance for hundreds of steps.
            self.head.initial_std = {"weight": pooled**-0.5}
        self.watch = CollapseWatch()
        self.balance = None if settings.balance is None else LossBalance(KINDS, settings.balance)
        self.momentum_targets = MomentumTargets(
            {"target.encoder": f"encoders.{settings.encoder}", "target.projector": "projector"},
            settings.momentum_start,
            settings.momentum_end,
        )
        self.pooled_width, self.text_width, self.text_flops = pooled, text_width, text_flops
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.counted_by = counted_by(text_width is not None, classes is not None)

    def count(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """What the losses of a micro-batch are averaged over; the global sums are `totals`."""
        return count_targets(batch)

    def forward(
        self,
        encoders: Mapping[str, nn.Module],
        batch: Mapping[str, Any],
        totals: Mapping[str, float | Tensor],
        part: Literal["loss", "features"] = "loss",
    ) -> dict[str, Tensor]:
        """Features of a micro-batch, or the loss where it is all that this rank has of the batch.

        batch: images, second_images (B, 3, H, W) uint8, two views, of rows 2i only the first is
            read; crops (B, 2, 4), flips (B, 2); tokens (B, 1, T) int64, loss_mask (B, 1, T) bool,
            empty where there is no text; prompt_class (B,) int64 as in `match_classes`; labels
            (B,) int64; valid (B,) bool; draws of the samples; B even.
        totals: as in `coupled_loss`.

        Returns what `coupled_loss` returns, or with part "features" what it reads.

        Raises:
            ValueError: an odd batch; `balance` with a batch in several micro-steps.
        """
        features, dense = self.features(encoders, batch, batch["draws"])
        if part == "loss":
            return self._shares(features, totals, dense)
        if self.balance is not None:
            raise ValueError(
                "balance measures the gradient at the encoder's output, which is not kept when a "
                "rank has its part of the batch in several micro-steps: raise micro_batch until it "
                "has one, or set balance to null"
            )
        return features

    def coupled_loss(
        self, features: Mapping[str, Tensor], totals: Mapping[str, float | Tensor]
    ) -> dict[str, Tensor]:
        """This rank's share of the global batch's loss and metrics. A collective; no parameter is
        read, so it may run outside of the engine.

        features: see `m3i_loss.m3i_losses`; totals: global sums of `count`.

        Returns 0-dim float32 tensors whose sums over ranks are: loss; intra, inter, text, category,
        means over what has such a target, without their weights; image_to_text, text_to_image
        (accuracy), top1; with_text, labelled, shares of the images; temperature; effective_rank and
        target_std of the dense targets. Only "loss" carries a gradient.
        """
        return self._shares(features, totals, None)

    def _shares(
        self,
        features: Mapping[str, Tensor],
        totals: Mapping[str, float | Tensor],
        dense: Tensor | None,
    ) -> dict[str, Tensor]:
        device, settings = features["target"].device, self.settings
        totals = {
            name: torch.as_tensor(value, dtype=torch.float32, device=device)
            for name, value in totals.items()
        }
        losses, metrics, moments = m3i_losses(
            features, totals, settings.decorrelation, settings.label_smoothing,
            settings.center_targets,
        )
        weights = {kind: getattr(settings.weights, kind) for kind in losses}
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.balance is not None and self.training:
            self.balance.observe(losses, dense)
            factors = self.balance.factors()
            weights = {kind: weight * factors[kind] for kind, weight in weights.items()}
            metrics |= {f"weight_{kind}": weight / world for kind, weight in weights.items()}
        loss = sum(weights[kind] * value for kind, value in losses.items())
        shares = torch.stack([totals["intra"], totals["inter"]])
        shares = shares / shares.sum().clamp(min=1.0)
        deviation = target_deviation(moments, shares)
        metrics["target_std"] = deviation / world
        if self.training:
            width = features["target"].shape[-1]
            rank = self.watch.observe(lambda: effective_rank(moments, shares), deviation, width)
            metrics["effective_rank"] = rank / world
        return {"loss": loss} | {n: v.detach() for n, v in (losses | metrics).items()}

    def features(
        self, encoders: Mapping[str, nn.Module], batch: Mapping[str, Any], draws: SampleDraws
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the losses read of a micro-batch, and the encoder's output (B / 2, N, width)."""
        encoder, images = encoders[self.encoder], batch["images"]
        check_pairs(len(images))
        size = tuple(images.shape[-2:])
        cells = (size[0] // self.settings.cell, size[1] // self.settings.cell)
        grid = encoder.grid("cells").sides(*size)
        masks = pair_masks(draws, cells)
        dense = encoder.encode(
            mix_pixels(self._pixels(encoder, images), masks),
            ("cells",),
            SampleDraws(draws.seed, draws.task, draws.positions[::2]),
            joined=self.mark(on_grid(masks, encoder.grid("stem").sides(*size))),
            groups=on_grid(masks, grid) if self.settings.group_attention else None,
        ).cells
        own = own_tokens(masks, grid)
        count = -(-cells[0] * cells[1] // 2) * (own.shape[1] // (cells[0] * cells[1]))
        tokens, places, present = gather_own(dense, own, count)
        first = torch.arange(len(images), device=images.device) % 2 == 0
        positions, scales = relative_positions(*self._geometry(batch, first), grid)
        prediction = self.predictor(
            self.projector(tokens, present), places, present, grid, positions, scales
        )
        features = {
            "prediction": prediction.float(),
            "target": self._targets(batch, first),
            "counted": ~own | ~first[:, None],
            "valid": batch["valid"],
            "labels": batch["labels"],
        }
        vectors = self.pool.vectors(encoder, tokens, present)
        return features | self._answers(encoders, batch, vectors), dense

    def _answers(
        self, encoders: Mapping[str, nn.Module], batch: Mapping[str, Any], vectors: Tensor
    ) -> dict[str, Tensor]:
        """The features of texts and classes. vectors: (B, pooled_width) of the images."""
        found: dict[str, Tensor] = {}
        if self.text_encoder is not None:
            tokens, mask = batch["tokens"][:, 0], batch["loss_mask"][:, 0]
            found = {
                "image": F.normalize(vectors.float(), dim=1),
                "text": self.text_features(encoders, tokens),
                "caption_id": caption_ids(tokens, mask),
                "match_class": match_classes(batch, self.settings.labels_match),
                "has_text": mask.any(dim=1) & batch["valid"],
                "scale": self.temperature(),
            }
        if self.head is not None:
            found["logits"] = self.class_logits(encoders, vectors)
        return found

    def text_features(self, encoders: Mapping[str, nn.Module], tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Returns (B, pooled_width) float32 of unit length."""
        projected = self.text_projection(encoders[self.text_encoder](tokens))
        return F.normalize(projected.float(), dim=1)

    def image_vectors(self, encoders: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        """Vectors of whole images (B, 3, H, W) uint8: (B, pooled_width)."""
        encoder = encoders[self.encoder]
        cells = encoder.encode(self._pixels(encoder, images), ("cells",)).cells
        return self.pool.vectors(encoder, cells, None)

    def class_logits(self, encoders: Mapping[str, nn.Module], vectors: Tensor) -> Tensor:
        """vectors: (B, pooled_width). Returns (B, classes) float32."""
        return self.head(self.pool.normed(encoders[self.encoder], vectors)).float()

    def _targets(self, batch: Mapping[str, Any], first: Tensor) -> Tensor:
        """(B, N, C) float32 of each image's target view; first: (B,) bool, rows 2i."""
        if "constant_features" in batch:
            return batch["constant_features"]["target"]
        views = torch.where(
            first[:, None, None, None], batch["images"], batch["second_images"]
        )
        return self.target(self._pixels(self.target.encoder, views))

    @staticmethod
    def _geometry(batch: Mapping[str, Any], first: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (B, 2, 4) and flips (B, 2) of input and target."""
        second = (~first).long()
        rows = torch.arange(len(first), device=first.device)
        return tuple(
            torch.stack([views[:, 0], views[rows, second]], dim=1)
            for views in (batch["crops"], batch["flips"])
        )

    def _pixels(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return normalise_pixels(images, self.image_mean, self.image_std, encoder.dtype)

    def flops(self, batch: Mapping[str, Any]) -> int:
        """Model FLOPs, forward and backward, that this micro-batch asks for; the target branch has
        no backward pass. Padding and the second pass over cached features do not count."""
        size = tuple(batch["images"].shape[-2:])
        encoder = self.target.encoder
        rows, columns = encoder.grid("cells").sides(*size)
        tokens = rows * columns
        dense = encoder.flops(*size, want="cells")
        trained = dense // 2 + self.projector.flops(tokens // 2)
        trained += self.predictor.flops(tokens // 2, tokens)
        trained += self.pool.flops(encoder, tokens // 2)
        texts = 0
        if self.text_flops is not None:
            texts = self.text_flops(batch["tokens"].shape[-1])
            trained += 2 * self.text_width * self.pooled_width
        if self.head is not None:
            trained += 2 * self.head.in_features * self.head.out_features
        target = dense + self.projector.flops(tokens)
        return int(batch["valid"].sum()) * (3 * trained + texts + target)

    def evaluate(
        self,
        encoders: Mapping[str, nn.Module],
        loader: Iterable[Mapping[str, Any]],
        vocabulary: Any,
        device: torch.device,
        reduce: Gather = alone,
        **_: Any,
    ) -> tuple[dict[str, float], list]:
        """Held-out losses of mixed images, and what whole images are good for; see
        `m3i_evaluation.evaluate_m3i`. No examples."""
        return evaluate_m3i(self, encoders, loader, device, reduce), []
