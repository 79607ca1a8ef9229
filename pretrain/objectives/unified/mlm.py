"""Masked words: each is sought among all words."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.evaluation_mode import evaluating, mean
from pretrain.objectives.objective import (
    Batch,
    Evaluation,
    EvaluationContext,
    Modules,
    Shares,
    Totals,
)
from pretrain.objectives.unified.parts import UnifiedParts, noise_of
from pretrain.objectives.unified.words import WordObjective

_MASKED, _OTHER = 0.8, 0.1


class UnifiedMlm(WordObjective):
    """Rows of text of which some words are hidden.

    The padding token, which is nowhere else in a text, stands where a word is masked.

    Args:
        parts: the shared modules. vocabulary: the tokenizer. share: as in `UnifiedMlmSettings`.
    """

    def __init__(self, parts: UnifiedParts, vocabulary: Any, share: float = 0.15) -> None:
        super().__init__(parts, vocabulary.vocab_size, "mlm")
        if vocabulary.pad_id in (vocabulary.bos_id, vocabulary.eos_id):
            raise ValueError(
                "the tokenizer's padding token begins or ends texts too, so it cannot stand for "
                "masked words: name another one as tokenizer.pad_token"
            )
        self.share, self.vocab_size, self.mask_id = share, vocabulary.vocab_size, vocabulary.pad_id

    def counts(self, batch: Batch) -> dict[str, int]:
        """Rows, and tokens to be predicted."""
        present = batch["mask"].sum(dim=1)
        return {"rows": int((present > 0).sum()), "tokens": int(self._number(present).sum())}

    def _number(self, present: Tensor) -> Tensor:
        """Tokens to be predicted of rows with so many, (B,) int64."""
        wanted = (present * self.share).round().long().clamp(min=1)
        return torch.minimum(wanted, present)

    def hidden(self, batch: Batch, draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) with hidden words, and which are to be predicted, (B, T) bool: exactly as
        many as `counts` says, by the draws of the sample."""
        tokens, present = batch["tokens"], batch["mask"]
        length = tokens.shape[1]
        order = draws.uniform("mlm place", length).T.masked_fill(~present, 2.0)
        rank = order.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        chosen = rank < self._number(present.sum(dim=1))[:, None]
        what, word = draws.uniform("mlm kind", length).T, draws.uniform("mlm word", length).T
        others = (word * self.vocab_size).long().clamp(max=self.vocab_size - 1)
        hidden = torch.where(what < _MASKED + _OTHER, others, tokens)
        hidden = torch.where(what < _MASKED, self.mask_id, hidden)
        return torch.where(chosen, hidden, tokens), chosen

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's share of the mean over the hidden words of the global batch.

        batch: tokens, documents (B, T) int64 and mask (B, T) bool, as text data have them; draws.
        """
        return self.word_shares(self._sums(modules, batch, batch["draws"], shared), totals)

    def _sums(
        self, modules: Modules, batch: Batch, draws: SampleDraws, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen = self.hidden(batch, draws)
        part = self.parts.text_part(
            modules, hidden, "masked_text", batch["mask"], batch["documents"]
        )
        part = part._replace(mask=sequence_mask(batch["mask"], batch["documents"]))
        # As many rows on every call as a batch can have, so that the host need not wait to learn
        # how many words are hidden.
        most = int(self.share * chosen.shape[1]) + 1
        places = chosen.int().topk(min(most, chosen.shape[1]), dim=1).indices
        found = modules[self.parts.decoder].run([part], noise_of(batch.get("step_draws")))[0][:, 1:]
        found = found.gather(1, places[..., None].expand(-1, -1, found.shape[-1]))
        vectors = modules[self.parts.decoder].compared(found.flatten(0, 1))
        labels = batch["tokens"].gather(1, places).flatten()
        weights = chosen.gather(1, places).flatten().float()
        return self.sums(vectors, labels, weights, shared)

    def flops(self, batch: Batch) -> int:
        """Forward and backward, of the rows; words of the vocabulary do not count."""
        length = batch["tokens"].shape[1]
        each = self.parts.text_flops(length) + self.parts.decoder_flops(1 + length)
        return int(batch["mask"].any(dim=1).sum()) * each

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """perplexity, cross_entropy and token_accuracy of the hidden words of all ranks, and
        images: the rows. What is hidden depends on the row's number alone; there are no examples.
        """
        sums, tokens, rows = torch.zeros(3, dtype=torch.float64), 0, 0
        with torch.no_grad(), evaluating(self, *self.parts.all_of(modules)):
            shared = self.shared(modules, None)
            for batch in loader:
                names = ("tokens", "documents", "mask")
                moved = {name: batch[name].to(context.device) for name in names}
                draws = SampleDraws(0, "evaluation", batch["row"].to(context.device))
                found = self._sums(modules, moved, draws, shared)
                sums += torch.stack(found).double().cpu()
                counted = self.counts(batch)
                tokens, rows = tokens + counted["tokens"], rows + counted["rows"]
        gathered = context.reduce({"sums": sums.tolist(), "tokens": tokens, "rows": rows})
        total = sum(part["tokens"] for part in gathered)
        _, cross_entropy, right = (
            mean(sum(part["sums"][i] for part in gathered), total) for i in range(3)
        )
        metrics = {
            "perplexity": None if cross_entropy is None else math.exp(min(cross_entropy, 700.0)),
            "cross_entropy": cross_entropy,
            "token_accuracy": right,
            "images": float(sum(part["rows"] for part in gathered)),
        }
        return Evaluation(metrics, [])


def sequence_mask(present: Tensor, documents: Tensor) -> Tensor:
    """Where `<SPE>` and the tokens behind it may look, (B, 1, 1 + T, 1 + T) bool: tokens at those
    of their own document and at `<SPE>`, which looks at all that is there if that is one document,
    and else at itself alone: it would tell documents of each other.

    present: (B, T) bool; documents: (B, T) int64.
    """
    same = (documents[:, :, None] == documents[:, None, :]) & present[:, None, :]
    mask = torch.nn.functional.pad(same, (1, 0, 1, 0), value=True)
    one = (documents.masked_fill(~present, 0).amax(dim=1, keepdim=True)) == 0
    mask[:, 0, 1:] = present & one
    return mask[:, None]
