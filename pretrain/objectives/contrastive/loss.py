"""Symmetric softmax over the pairs of a batch that is spread over all ranks."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipeline.samples.labels import NO_LABEL
from pretrain.objectives.gather import gather_rows
from pretrain.objectives.labels_match import (
    LabelsMatch,
)

# An odd number: its powers modulo 2**64 never vanish.
_HASH_BASE = 0x9E3779B97F4A7C15


def contrastive_sums(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    caption_id: Tensor,
    valid: Tensor,
    identical_match: bool,
    match_class: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and hits of this rank's pairs among the pairs of all ranks. A collective.

    Each image is held against all texts and each text against all images; the target is spread
    evenly over what matches. The loss of a pair is the mean of its two cross-entropies.

    image, text: (n, D) float32 of unit length, equally many rows on every rank.
    scale: (1,) float32, what similarities are multiplied by.
    caption_id: (n,) int64, equal for identical captions.
    valid: (n,) bool; other rows neither count nor stand against any pair.
    identical_match: an image matches every text with its caption, and not only its own.
    match_class: (n,) int64, NO_LABEL where there is none, see `match_classes`: an image also
        matches every text of its class (UniCL, arXiv 2204.03610).

    Returns three 0-dim float32 tensors, sums over this rank's valid pairs: loss (with gradient),
    images whose best text matches, texts whose best image matches.
    """
    all_image, all_text = gather_rows(torch.cat([image, text], dim=1)).chunk(2, dim=1)
    if match_class is None:
        match_class = torch.full_like(caption_id, NO_LABEL)
    rows = gather_rows(_labels(caption_id, valid, match_class))
    all_ids, all_valid, all_places, all_classes = rows.unbind(dim=1)
    if identical_match:
        matches = caption_id[:, None] == all_ids
    else:
        matches = _places(len(image), image.device)[:, None] == all_places
    of_class = match_class[:, None] == all_classes
    matches = matches | (of_class & (match_class != NO_LABEL)[:, None])
    usable = all_valid.bool()
    matches = matches & usable
    targets = matches.float() / matches.sum(dim=1, keepdim=True).clamp(min=1)
    sums = [
        _row_sums(scale * queries @ keys.T, targets, matches, usable, valid)
        for queries, keys in ((image, all_text), (text, all_image))
    ]
    (image_loss, image_hits), (text_loss, text_hits) = sums
    return (image_loss + text_loss) / 2, image_hits, text_hits


def _row_sums(
    logits: Tensor, targets: Tensor, matches: Tensor, usable: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and hits, summed over valid rows. logits, targets, matches: (n, N); usable
    (N,) and valid (n,) bool."""
    # The smallest number and not infinity: infinity times a target of zero would be no number.
    logits = logits.masked_fill(~usable, torch.finfo(logits.dtype).min)
    losses = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    hits = matches.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return (losses * valid).sum(), (hits & valid).sum().float()


def match_classes(batch: Mapping[str, Any], labels_match: LabelsMatch) -> Tensor:
    """The class by which each row matches others, (B,) int64, NO_LABEL where none does.

    batch: prompt_class (B,) int64, equal where texts were made from the name of the same class,
        NO_LABEL where a text was not made from one; for "always" labels (B,) int64.

    Captions of their own are told apart also within a class: else the loss would say that what a
    caption adds to the class does not matter.
    """
    if labels_match == "always":
        return batch["labels"]
    prompts = batch["prompt_class"]
    return prompts if labels_match == "prompts" else torch.full_like(prompts, NO_LABEL)


def _labels(caption_id: Tensor, valid: Tensor, match_class: Tensor) -> Tensor:
    """What others must know of each row beside its features: (n, 4) int64."""
    places = _places(len(valid), valid.device)
    return torch.stack([caption_id, valid.long(), places, match_class], dim=1)


def _places(rows: int, device: torch.device) -> Tensor:
    """Numbers of this rank's rows among all rows, (n,) int64."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return rank * rows + torch.arange(rows, device=device)


def caption_ids(tokens: Tensor, mask: Tensor) -> Tensor:
    """A 64-bit hash of each text, which does not depend on padding.

    tokens: (..., T) int64; mask: (..., T) bool, True at the tokens that make the text. Returns
    (...,) int64: equal for equal texts, and for different ones with a chance of about 2**-47.
    """
    powers = _powers(tokens.shape[-1]).to(tokens.device, non_blocking=True)
    return ((tokens + 1) * powers * mask).sum(dim=-1)  # products wrap around, as they should


@functools.lru_cache(maxsize=64)
def _powers(count: int) -> Tensor:
    """The first powers of the base, modulo 2**64, as signed numbers."""
    powers = [pow(_HASH_BASE, exponent, 1 << 64) for exponent in range(1, count + 1)]
    return torch.tensor([p - (1 << 64) if p >= 1 << 63 else p for p in powers])
