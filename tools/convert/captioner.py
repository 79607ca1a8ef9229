"""Captions of an export by transformers' own model, and their scores; see `tools.evaluate`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipeline.loader.loader import EvaluationLoader
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.shards.shard_set import ShardSet
from pretrain.objectives.captioning.evaluation import CaptionExample, evaluate_captions
from tools.convert.record import heldout_loader

console = Console()


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found."""

    metrics: dict[str, float]
    examples: list[CaptionExample]
    """One per image, in row order; the first few with the image as the model saw it."""
    seconds: float
    bad_samples: int
    shards: ShardSet
    """What the images were read from."""


class Captioner:
    """transformers' model, tokenizer and image statistics of an export, on one device."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        from tools.convert.transformers_git import read_git

        self.device = device
        self.model = read_git(folder).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        mean, std = processor.image_mean, processor.image_std
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def judge(self, batch: Mapping[str, Any]) -> tuple[dict[str, float], list[list[int]]]:
        """Sums over supervised tokens, and greedy captions, of one batch of the loader."""
        pixels = (batch["images"].to(self.device).float() / 255 - self.mean) / self.std
        sums = self._token_sums(pixels, batch["tokens"], batch["loss_mask"])
        ids = self.model.generate(pixel_values=pixels, do_sample=False, num_beams=1)
        return sums, ids.tolist()

    def _token_sums(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, float]:
        """pixels: (B, 3, S, S); tokens, mask: (B, K, T), right-padded."""
        # With more texts than images, transformers repeats the images as a whole: first captions of
        # all images, then second ones. The padding behind a text needs no mask, as nothing that is
        # scored looks at it.
        tokens, mask = (x.to(self.device).transpose(0, 1).flatten(0, 1) for x in (tokens, mask))
        logits = self.model(
            pixel_values=pixels,
            input_ids=tokens[:, :-1],
            use_cache=False,
            logits_to_keep=tokens.shape[1] - 1,
        ).logits
        supervised = mask[:, 1:]
        scores, targets = logits[supervised].log_softmax(-1), tokens[:, 1:][supervised]
        return {
            "cross_entropy": -scores.gather(1, targets[:, None]).sum().item(),
            "token_accuracy": float((scores.argmax(-1) == targets).sum()),
        }


def evaluate(
    folder: str | Path,
    data: CaptionDataSettings,
    *,
    batch: int = 32,
    max_samples: int | None = None,
    workers: int = 0,
    keep_images: int = 16,
    device: torch.device | None = None,
) -> Evaluated:
    """Run an export over held-out samples.

    data: from `ExportRecord.data`.

    Raises:
        ValueError: `folder` is no export, or no sample could be used.
        FileNotFoundError, ShardError: the shards cannot be read.
    """
    loader = heldout_loader(data, Tokenizer.load(folder), batch, max_samples, workers)
    with console.status("loading the model with transformers"):
        captioner = Captioner(folder, device or torch.device("cpu"))
    started = time.monotonic()
    metrics, examples = evaluate_captions(
        captioner.judge, _with_progress(loader), captioner, keep_images=keep_images
    )
    (faults,) = loader.faults().values()
    if not examples:
        raise ValueError(
            f"none of the {loader.samples} samples of {', '.join(data.shards)} could be used; "
            f"last: key {faults.last.key!r}: {faults.last.reason}"
        )
    seconds = time.monotonic() - started
    return Evaluated(metrics, examples, seconds, faults.replaced, loader.stream.reader.shards)


def _with_progress(loader: EvaluationLoader) -> Iterator[dict[str, Any]]:
    columns = TextColumn("captioning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=loader.samples)
        for batch in loader:
            yield batch
            bar.advance(task, len(batch["valid"]))
