"""Prove an export: transformers reads it from disk, and its scores are held against ours."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, GitForCausalLM

from data_pipeline.loader.stream import DataError
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from pretrain.models.pixels import normalise_pixels
from tools.convert.record import ExportRecord, Verification, heldout_loader
from tools.convert.transformers_git import read_git
from tools.support.trained import TrainedCaptioner

TOLERANCE = 1e-4
_RANDOM_IMAGES = 4
_HELDOUT_IMAGES = 8
_SEED = 0


@dataclass
class _Comparison:
    """Both models, and the largest differences seen so far."""

    captioner: TrainedCaptioner
    record: ExportRecord
    twin: GitForCausalLM
    processor: transformers.ProcessorMixin
    largest: dict[str, float] = field(default_factory=dict)

    def scores(self, kind: str, images: Tensor, tokens: Tensor) -> None:
        """Next-word log-probabilities of given captions.

        images: (B, 3, S, S) uint8; tokens: (B, T) int64 from BOS on.
        """
        theirs = self.twin(
            pixel_values=self._pixels(images),
            input_ids=tokens[:, :-1],
            use_cache=False,
            logits_to_keep=tokens.shape[1] - 1,
        ).logits
        self._note(kind, _our_scores(self.captioner, images, tokens), theirs.log_softmax(-1))

    def generation(self, kind: str, images: Tensor) -> None:
        """Log-probabilities of every word of captions that transformers writes with its cache.

        Comparing scores, not captions: two words may be equally likely.
        """
        written = self.twin.generate(
            pixel_values=self._pixels(images),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids, theirs = written.sequences, torch.stack(written.logits, dim=1).log_softmax(-1)
        ours = _our_scores(self.captioner, images, ids)
        eos = self.captioner.tokenizer.eos_id
        running = ((ids[:, 1:] == eos).cumsum(1) - (ids[:, 1:] == eos).long()) == 0
        self._note(kind, ours[running], theirs[running])

    def _pixels(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return self.processor(images=pictures, return_tensors="pt").pixel_values

    def _note(self, kind: str, ours: Tensor, theirs: Tensor) -> None:
        largest = (ours - theirs).abs().max().item()
        # NaN must not pass for a small difference.
        largest = largest if largest == largest else float("inf")
        self.largest[kind] = max(self.largest.get(kind, 0.0), largest)


@torch.no_grad()
def verify(captioner: TrainedCaptioner, folder: Path, record: ExportRecord) -> Verification:
    """Read `folder` with transformers and compare it with the model that it was made from.

    Seeded random images and captions always; samples of the recipe's held-out shards where those
    can be read, both teacher-forced and through `generate`.

    Raises:
        ValueError: the exported tokenizer gives other ids than ours.
    """
    comparison = _Comparison(
        captioner,
        record,
        read_git(folder),
        AutoProcessor.from_pretrained(folder),
    )
    images, tokens = _random_inputs(captioner, record)
    comparison.scores("random images and captions", images, tokens)
    comparison.generation("generation on random images", images)
    texts, preprocessing = ["", "two words"], {}
    for batch in _heldout_batches(captioner, record):
        valid = batch["valid"]
        pictures = batch["images"][valid]
        if len(pictures) == 0:
            continue
        comparison.scores("held-out images and captions", pictures, batch["tokens"][valid][:, 0])
        comparison.generation("generation on held-out images", pictures)
        texts += [text for captions in batch["captions"] for text in captions]
        preprocessing = _preprocessing(captioner, folder, record, batch)
    _check_tokenizer(captioner, folder, texts)
    return Verification(
        passed=all(value <= TOLERANCE for value in comparison.largest.values()),
        tolerance=TOLERANCE,
        differences=comparison.largest,
        preprocessing=preprocessing,
        transformers=transformers.__version__,
    )


def _our_scores(captioner: TrainedCaptioner, images: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (B, T - 1, vocabulary) of the word after each token of (B, T)."""
    objective, encoder = captioner.objective, captioner.encoder
    pixels = normalise_pixels(images, objective.image_mean, objective.image_std, encoder.dtype)
    inputs = tokens[:, None, :-1]
    logits = objective.decoder(encoder(pixels), inputs, torch.arange(inputs.numel()))
    return logits.view(*tokens[:, :-1].shape, -1).log_softmax(-1)


def _random_inputs(captioner: TrainedCaptioner, record: ExportRecord) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    size, words = record.image.size, captioner.tokenizer.vocab_size
    length = min(record.text_length, captioner.decoder.max_positions)
    shape = (_RANDOM_IMAGES, 3, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, words, (_RANDOM_IMAGES, length), generator=generator)
    tokens[:, 0] = captioner.tokenizer.bos_id
    return images, tokens


def _heldout_batches(captioner: TrainedCaptioner, record: ExportRecord) -> Iterator[dict]:
    """One batch of the recipe's held-out samples; nothing where they are out of reach."""
    evaluation = captioner.task.evaluation
    if evaluation is None:
        return
    data = record.data(evaluation.shards)
    try:
        yield from heldout_loader(data, captioner.tokenizer, _HELDOUT_IMAGES, _HELDOUT_IMAGES)
    except (DataError, OSError, ShardError):
        return


def _preprocessing(
    captioner: TrainedCaptioner, folder: Path, record: ExportRecord, batch: dict
) -> dict[str, float]:
    """Differences between two ways from a file to pixels, in levels of 0..255."""
    shards = ShardSet.open(captioner.task.evaluation.shards)
    processor = AutoImageProcessor.from_pretrained(folder)
    std, mean = (np.array(v)[:, None, None] for v in (record.image.std, record.image.mean))
    means, largest = [], 0.0
    with SampleReader(shards) as reader:
        for place in batch["valid"].nonzero()[:, 0].tolist():
            members = reader.read(int(batch["row"][place])).members
            name = next(e for e in record.image_extensions if e in members)
            picture = Image.open(io.BytesIO(members[name]))
            pixels = processor(images=picture, return_tensors="np").pixel_values[0]
            levels = (pixels * std + mean) * 255
            gap = np.abs(levels - batch["images"][place].numpy())
            means.append(float(gap.mean()))
            largest = max(largest, float(gap.max()))
    return {"mean": float(np.mean(means)), "largest": largest}


def _check_tokenizer(captioner: TrainedCaptioner, folder: Path, texts: list[str]) -> None:
    exported, ours = AutoTokenizer.from_pretrained(folder), captioner.tokenizer
    for text in texts:
        expected = [ours.bos_id, *ours.encode(text), ours.eos_id]
        found = exported(text).input_ids
        if found != expected:
            raise ValueError(
                f"the exported tokenizer gives {found} for {text!r}, ours {expected}; the export "
                "cannot be used with it"
            )
        if exported.decode(expected, skip_special_tokens=True).rstrip() != ours.decode(expected):
            raise ValueError(f"the exported tokenizer writes the words of {text!r} differently")
