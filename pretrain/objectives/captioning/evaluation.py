"""Caption a whole data set, on all ranks, and compare with its references."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.objectives.captioning.metrics import caption_scores
from pretrain.objectives.evaluation_mode import Gather, mean
from pretrain.objectives.objective import Evaluation


class Vocabulary(Protocol):
    """What captioning needs to know of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids between BOS and the first EOS, without special tokens."""


@dataclass(frozen=True)
class CaptionExample:
    """One evaluated image."""

    row: int
    key: str
    caption: str
    references: list[str]
    image: Tensor | None = None
    """(3, H, W) uint8 as the model saw it, the frames of a clip side by side; only the first few of
    this rank keep theirs."""

    def drawn(self) -> tuple[np.ndarray, str] | None:
        """The picture (H, W, 3) uint8, and caption and first reference for below it."""
        if self.image is None:
            return None
        reference = self.references[0] if self.references else "no reference"
        return self.image.permute(1, 2, 0).numpy(), f"{self.caption}\n({reference})"


def evaluate_captions(
    judge: Callable[[Mapping[str, Any]], tuple[Mapping[str, float], list[list[int]] | None]],
    loader: Iterable[Mapping[str, Any]],
    vocabulary: Vocabulary,
    reduce: Gather = lambda value: [value],
    keep_images: int = 16,
) -> Evaluation:
    """Run `judge` over all batches and put the ranks' results together.

    judge: batch -> (sums over its supervised tokens, generated ids from BOS on for each row; None
        where none are written: then there are no scores and no examples).
    loader: evaluation batches on the CPU, with the same number of batches on every rank; read here
        are images, loss_mask, valid, row, key, and captions (a list of references per image).
    reduce: one JSON-like value per rank -> the values of all ranks in rank order, on every rank.

    Returns the metrics of the whole set (where there are references, the scores of
    `caption_scores`; the sums divided by the number of supervised tokens, None without any; and
    `images`; perplexity is that of a token), in the order that matters, and one example per image
    in row order. Both are the same on every rank, but for the images kept.
    """
    sums: dict[str, float] = {}
    tokens = images = 0
    records: list[dict[str, Any]] = []
    kept: dict[int, Tensor] = {}
    for batch in loader:
        tokens += int(batch["loss_mask"][..., 1:].sum())
        batch_sums, ids = judge(batch)
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + value
        images += int(batch["valid"].sum())
        for i in batch["valid"].nonzero()[:, 0].tolist() if ids is not None else ():
            row = int(batch["row"][i])
            record = {"row": row, "key": batch["key"][i], "references": list(batch["captions"][i])}
            records.append(record | {"caption": vocabulary.decode(ids[i])})
            if len(kept) < keep_images:
                kept[row] = _picture(batch["images"][i])
    parts = reduce({"sums": sums, "tokens": tokens, "images": images, "records": records})
    total = sum(part["tokens"] for part in parts)
    merged = sorted((r for part in parts for r in part["records"]), key=lambda r: r["row"])
    metrics: dict[str, float | None] = {}
    if judged := [r for r in merged if r["references"]]:
        captions = [r["caption"] for r in judged]
        metrics |= caption_scores(captions, [r["references"] for r in judged]).means
    metrics |= {
        name: mean(sum(part["sums"].get(name, 0.0) for part in parts), total)
        for name in dict.fromkeys(name for part in parts for name in part["sums"])
    }
    if (cross_entropy := metrics.get("cross_entropy")) is not None:
        metrics["perplexity"] = math.exp(min(cross_entropy, 700.0))
    metrics["images"] = float(sum(part["images"] for part in parts))
    return Evaluation(metrics, [CaptionExample(**r, image=kept.get(r["row"])) for r in merged])


def _picture(image: Tensor) -> Tensor:
    """(3, H, W) of an image, or (3, H, F * W) of a clip (F, 3, H, W)."""
    return image.clone() if image.dim() == 3 else torch.cat(list(image), dim=2)
