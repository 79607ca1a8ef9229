"""Objectives that seek words: their target set is the vocabulary."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pretrain.models.general.decoder import Family
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.captioning.chunked_head import smoothed_cross_entropy_of
from pretrain.objectives.objective import Modules, Objective, Shares, Totals
from pretrain.objectives.unified.parts import UnifiedParts, word_rows


class WordObjective(Objective):
    """Loss of vectors against all words.

    Args:
        parts: the shared modules. vocab_size: words. family: whose temperature it has.
        label_smoothing: share of the target spread over the words that are not the label.
    """

    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {
        name: ("tokens",) for name in ("loss", "cross_entropy", "token_accuracy")
    }

    def __init__(
        self, parts: UnifiedParts, vocab_size: int, family: Family, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.parts, self.family, self.label_smoothing = parts, family, label_smoothing
        self.words = word_rows(vocab_size)

    def shared(self, modules: Modules, draws: StepDraws | None) -> dict[str, Tensor]:
        """targets: (words, width) of unit length; scale: (1,). A collective."""
        targets = self.parts.targets(modules, *self.words, "words", draws)
        return {"targets": targets, "scale": self.parts.scale(modules, self.family)}

    def sums(
        self, vectors: Tensor, labels: Tensor, weights: Tensor, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Smoothed loss, cross-entropy and correct guesses, summed with weights.

        vectors: (n, width) of unit length; labels: (n,) int64; weights: (n,) float32.
        """
        scaled, words = shared["scale"] * vectors, shared["targets"]
        return smoothed_cross_entropy_of(scaled, words, None, labels, weights, self.label_smoothing)

    def word_shares(self, sums: tuple[Tensor, Tensor, Tensor], totals: Totals) -> Shares:
        """Means over the "tokens" of the global batch."""
        tokens = torch.as_tensor(totals["tokens"], dtype=torch.float32, device=sums[0].device)
        names = ("loss", "cross_entropy", "token_accuracy")
        return {n: s / tokens.clamp(min=1.0) for n, s in zip(names, sums, strict=True)}
