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
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.contrastive.contrastive import Temperature
from pretrain.objectives.contrastive.loss import caption_ids, match_classes
from pretrain.objectives.m3i.collapse import CollapseWatch
from pretrain.objectives.m3i.decoder import Predictor, Projector
from pretrain.objectives.m3i.decorrelation import effective_rank, target_deviation
from pretrain.objectives.m3i.evaluation import evaluate_m3i
from pretrain.objectives.m3i.heads import MeanPool, ProjectorPool, SourceMark, TargetBranch
from pretrain.objectives.m3i.loss import KINDS, count_targets, counted_by, m3i_losses
from pretrain.objectives.m3i.loss_balance import LossBalance
from pretrain.objectives.m3i.pair_masks import (
    check_pairs,
    gather_own,
    mix_pixels,
    on_grid,
    own_tokens,
    pair_masks,
)
from pretrain.objectives.m3i.view_positions import relative_positions
from pretrain.objectives.objective import (
    Batch,
    CoupledObjective,
    Evaluation,
    EvaluationContext,
    Modules,
    Shares,
    Totals,
)
from pretrain.optim.momentum import MomentumTargets

if TYPE_CHECKING:
    from pretrain.objectives.m3i.settings import M3ISettings


class M3I(CoupledObjective):
    """Heads, target branch, losses and evaluation of M3I.

    Args:
        settings: see `M3ISettings`.
        encoder: the one called `settings.encoder`; not kept.
        target_encoder: another one of the same shape.
        text_width: of the text encoder; text_flops: of it, forward and backward; None without one.
        classes: number of classes; None: no classes are predicted.
        image_mean, image_std: per channel, in units of the full range.
    """

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
            settings,
            settings.encoder,
            settings.text_encoder,
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

    def counts(self, batch: Batch) -> dict[str, int]:
        """What the losses of a micro-batch are averaged over; the global sums are `totals`."""
        return count_targets(batch)

    def shared(self, modules: Modules, draws: StepDraws) -> dict[str, Tensor]:
        """scale: (1,) float32, of the text loss; nothing without texts."""
        return {} if self.text_encoder is None else {"scale": self.temperature()}

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """See `loss`; with `balance`, which needs the encoder's output, too."""
        features, dense = self.encode(modules, batch, batch["draws"])
        with torch.no_grad():
            targets = self.targets(modules, batch)
        return self._shares({**features, **targets, **shared}, totals, dense)

    def features(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """See `encode`.

        Raises:
            ValueError: there is `balance`.
        """
        if self.balance is not None:
            raise ValueError(
                "balance measures the gradient at the encoder's output, which is not kept when a "
                "rank has its part of the batch in several micro-steps: raise micro_batch until it "
                "has one, or set balance to null"
            )
        return self.encode(modules, batch, batch["draws"])[0]

    def loss(
        self,
        features: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        totals: Totals,
    ) -> Shares:
        """This rank's share of the global batch's loss and metrics. A collective.

        features, targets, shared: together what `loss.m3i_losses` reads; totals: global sums of
        `counts`.

        Returns 0-dim float32 tensors whose sums over ranks are: loss; intra, inter, text, category,
        means over what has such a target, without their weights; image_to_text, text_to_image
        (accuracy), top1; with_text, labelled, shares of the images; temperature; effective_rank and
        target_std of the dense targets. Only "loss" carries a gradient.
        """
        return self._shares({**features, **targets, **shared}, totals, None)

    def _shares(
        self, features: Mapping[str, Tensor], totals: Totals, dense: Tensor | None
    ) -> Shares:
        device, settings = features["target"].device, self.settings
        totals = {
            name: torch.as_tensor(value, dtype=torch.float32, device=device)
            for name, value in totals.items()
        }
        losses, metrics, moments = m3i_losses(
            features,
            totals,
            settings.decorrelation,
            settings.label_smoothing,
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

    def encode(
        self, modules: Modules, batch: Batch, draws: SampleDraws
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What of a micro-batch carries a gradient: prediction, and image, text and logits if there
        are such targets (`m3i_losses`); and the encoder's output (B / 2, N, width).

        batch: images (B, 3, H, W) uint8; crops (B, 2, 4), flips (B, 2); tokens (B, 1, T) int64;
            B even.

        Raises ValueError: an odd batch.
        """
        encoder, images = modules[self.encoder], batch["images"]
        check_pairs(len(images))
        size = tuple(images.shape[-2:])
        cells, grid = self._cells(size), encoder.grid("cells").sides(*size)
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
        positions, scales = relative_positions(*self._geometry(batch), grid)
        prediction = self.predictor(
            self.projector(tokens, present), places, present, grid, positions, scales
        )
        features = {"prediction": prediction.float()}
        vectors = self.pool.vectors(encoder, tokens, present)
        if self.text_encoder is not None:
            features["image"] = F.normalize(vectors.float(), dim=1)
            features["text"] = self.text_features(modules, batch["tokens"][:, 0])
        if self.head is not None:
            features["logits"] = self.class_logits(modules, vectors)
        return features, dense

    def targets(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """What the features are held against.

        batch: images, second_images (B, 3, H, W) uint8, two views, of rows 2i only the first is
            read; tokens (B, 1, T) int64, loss_mask (B, 1, T) bool, empty where there is no text;
            prompt_class (B,) int64 as in `match_classes`; labels (B,) int64; valid (B,) bool.
        """
        return self.targets_of(batch, batch["draws"])

    def targets_of(self, batch: Batch, draws: SampleDraws) -> dict[str, Tensor]:
        """`targets` for these draws."""
        first = _first_of_pairs(batch)
        size = tuple(batch["images"].shape[-2:])
        grid = self.target.encoder.grid("cells").sides(*size)
        own = own_tokens(pair_masks(draws, self._cells(size)), grid)
        views = torch.where(first[:, None, None, None], batch["images"], batch["second_images"])
        found = {
            "target": self.target(self._pixels(self.target.encoder, views)),
            "counted": ~own | ~first[:, None],
            "valid": batch["valid"],
            "labels": batch["labels"],
        }
        if self.text_encoder is not None:
            tokens, mask = batch["tokens"][:, 0], batch["loss_mask"][:, 0]
            found |= {
                "caption_id": caption_ids(tokens, mask),
                "match_class": match_classes(batch, self.settings.labels_match),
                "has_text": mask.any(dim=1) & batch["valid"],
            }
        return found

    def _cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the cells that are mixed."""
        return size[0] // self.settings.cell, size[1] // self.settings.cell

    def text_features(self, modules: Modules, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64. Returns (B, pooled_width) float32 of unit length."""
        projected = self.text_projection(modules[self.text_encoder](tokens))
        return F.normalize(projected.float(), dim=1)

    def image_vectors(self, modules: Modules, images: Tensor) -> Tensor:
        """Vectors of whole images (B, 3, H, W) uint8: (B, pooled_width)."""
        encoder = modules[self.encoder]
        cells = encoder.encode(self._pixels(encoder, images), ("cells",)).cells
        return self.pool.vectors(encoder, cells, None)

    def class_logits(self, modules: Modules, vectors: Tensor) -> Tensor:
        """vectors: (B, pooled_width). Returns (B, classes) float32."""
        return self.head(self.pool.normed(modules[self.encoder], vectors)).float()

    @staticmethod
    def _geometry(batch: Batch) -> tuple[Tensor, Tensor]:
        """Crops (B, 2, 4) and flips (B, 2) of input and target."""
        second = (~_first_of_pairs(batch)).long()
        rows = torch.arange(len(second), device=second.device)
        return tuple(
            torch.stack([views[:, 0], views[rows, second]], dim=1)
            for views in (batch["crops"], batch["flips"])
        )

    def _pixels(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return normalise_pixels(images, self.image_mean, self.image_std, encoder.dtype)

    def flops(self, batch: Batch) -> int:
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
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Held-out losses of mixed images, and what whole images are good for; see
        `evaluation.evaluate_m3i`. No examples."""
        return Evaluation(evaluate_m3i(self, modules, loader, context.device, context.reduce), [])


def _first_of_pairs(batch: Batch) -> Tensor:
    """(B,) bool: rows 2i."""
    images = batch["images"]
    return torch.arange(len(images), device=images.device) % 2 == 0
