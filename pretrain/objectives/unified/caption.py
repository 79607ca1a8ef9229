"""Captioning: every word of a caption is sought among all words, in one pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.general.decoder import Segment, caption_masks
from pretrain.models.git.generation import alone
from pretrain.objectives.captioning.evaluation import evaluate_captions
from pretrain.objectives.evaluation_mode import evaluating
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


class UnifiedCaption(WordObjective):
    """An image, the caption, and one `<SPE>` for each of its words, which sees those before it.

    Args:
        parts: the shared modules. vocabulary: the tokenizer. others: as in
            `UnifiedCaptionSettings`.
    """

    def __init__(
        self,
        parts: UnifiedParts,
        vocabulary: Any,
        label_smoothing: float = 0.0,
        max_new_tokens: int = 40,
    ) -> None:
        super().__init__(parts, vocabulary.vocab_size, "caption", label_smoothing)
        self.eos_id, self.bos_id, self.pad_id = (
            vocabulary.eos_id,
            vocabulary.bos_id,
            vocabulary.pad_id,
        )
        self.max_new_tokens = max_new_tokens

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images and supervised tokens of a micro-batch."""
        tokens = int(batch["loss_mask"][..., 1:].sum())
        return {"images": int(batch["valid"].sum()), "tokens": tokens}

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """supervised: (n,) int64, places of the supervised tokens in (B, K, T - 1), flat."""
        return {"supervised": batch["loss_mask"][..., 1:].reshape(-1).nonzero()[:, 0]}

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's share of the mean over the supervised tokens of the global batch;
        batch as of `Captioning.losses`."""
        return self.word_shares(self.token_sums(modules, batch, shared), totals)

    def token_sums(
        self, modules: Modules, batch: Batch, shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `WordObjective.sums`, over supervised tokens."""
        decoder, step = modules[self.parts.decoder], batch.get("step_draws")
        images = self.parts.image_part(
            modules, batch["images"], "caption_image", batch.get("draws")
        ).tokens
        # What stands in for BOS is <SPE>: the first word follows the image.
        texts = batch["tokens"][..., 1:]
        captions, length = texts.shape[1:]
        prefix = images.repeat_interleave(captions, dim=0) if captions > 1 else images
        masks = caption_masks(length, prefix.shape[1], device=prefix.device)
        texts = texts.flatten(0, 1)
        present = torch.ones_like(texts, dtype=torch.bool)
        words, _ = modules[self.parts.text].sequence(texts, present, causal=True)
        queries = decoder.special(len(texts), length).to(prefix.dtype)
        found = decoder.run(
            [
                Segment(prefix, "caption_image", masks[0]),
                Segment(words, "caption_text", masks[1]),
                Segment(queries, "caption_text", masks[2]),
            ],
            noise_of(step),
        )[2].flatten(0, 1)
        places = batch["supervised"] if "supervised" in batch else self.prepare(batch)["supervised"]
        weights = torch.ones(len(places), device=found.device)
        if len(places) == 0:  # every parameter is in the graph all the same
            places, weights = places.new_zeros(1), weights.new_zeros(1)
        labels = texts.flatten().index_select(0, places)
        vectors = decoder.compared(found.index_select(0, places))
        return self.sums(vectors, labels, weights, shared)

    def flops(self, batch: Batch) -> int:
        """Forward and backward, of images and texts; words of the vocabulary do not count."""
        size, length = batch["images"].shape[-2:], batch["tokens"].shape[-1] - 1
        captions, parts = batch["tokens"].shape[1], self.parts
        text = parts.text_flops(length)
        sequence = parts.decoder_flops(1 + parts.image_tokens(*size) + 2 * length)
        each = parts.image_flops(*size) + captions * (text + sequence)
        return int(batch["valid"].sum()) * each

    @torch.no_grad()
    def generate(
        self,
        modules: Modules,
        images: Tensor,
        shared: Mapping[str, Tensor],
        agree: Callable[[bool], bool] = alone,
    ) -> Tensor:
        """Greedy captions of images (B, 3, H, W) uint8: ids (B, 1 + n) int64, BOS, words, EOS, then
        padding. Keys and values of what has been seen are kept.

        agree: gets "all my captions have ended" after every token and says whether to stop; all
            ranks need the same answer.
        """
        decoder, text = modules[self.parts.decoder], modules[self.parts.text]
        prefix = self.parts.image_part(modules, images, "caption_image")
        _, (seen,) = decoder.run_cached([prefix], None)
        batch, device = len(images), images.device
        ids = torch.full((batch, 1 + self.max_new_tokens), self.pad_id, device=device)
        ids[:, 0] = self.bos_id
        ended, parts = torch.zeros(batch, dtype=torch.bool, device=device), []
        for place in range(self.max_new_tokens):
            query = decoder.special(batch, 1, place).to(prefix.tokens.dtype)
            found, kept = decoder.run_cached([*parts, Segment(query, "caption_text")], seen)
            if parts:
                seen = [
                    tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
                    for old, new in zip(seen, kept[0], strict=True)
                ]
            scores = decoder.compared(found[-1][:, 0]) @ shared["targets"].T
            ids[:, place + 1] = torch.where(ended, self.pad_id, scores.argmax(dim=-1))
            ended |= ids[:, place + 1] == self.eos_id
            if agree(bool(ended.all())):
                break
            known = ids[:, 1 : place + 2]
            words, _ = text.sequence(known, torch.ones_like(known, dtype=torch.bool), causal=True)
            parts = [Segment(words[:, -1:], "caption_text")]
        return ids[:, : place + 2]

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Caption every image and compare with its references; results as of
        `evaluate_captions`."""
        with torch.no_grad(), evaluating(self, *self.parts.all_of(modules)):
            shared = self.shared(modules, None)

            def judge(batch: Batch) -> tuple[dict[str, float], list[list[int]] | None]:
                inputs = {k: batch[k].to(context.device) for k in ("images", "tokens", "loss_mask")}
                sums = torch.stack(self.token_sums(modules, inputs, shared)).tolist()
                if context.write_texts:
                    ids = self.generate(modules, inputs["images"], shared, context.agree)
                loss, cross_entropy, right = sums
                found = {"token_accuracy": right, "loss": loss, "cross_entropy": cross_entropy}
                return found, ids.tolist() if context.write_texts else None

            return evaluate_captions(
                judge, loader, context.vocabulary, context.reduce, context.keep_images
            )
