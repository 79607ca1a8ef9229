"""From the command line to a model, the data, and the task that joins them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from data_pipeline.images.mixing import MixingSettings
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.labels import LabelDataSettings, LabelProcessor
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.shards.shard_set import ShardSet
from tools.finetune.caption import Caption, build_captioner
from tools.finetune.classify import Classify, build_classifier
from tools.finetune.place import (
    as_shards,
    labels_of,
    split_rows,
    test_stream,
    training_stream,
)
from tools.finetune.settings import FinetuneSettings
from tools.finetune.source import Source, read_source
from tools.support.shard_facts import class_names


@dataclass(frozen=True)
class Job:
    """Everything that a fine-tuning is made of."""

    source: Source
    shards: list[str]
    task: Classify | Caption
    data: LabelDataSettings | CaptionDataSettings
    classes: list[str]
    held_out: ImageSettings
    """How held-out images are prepared."""


def set_up(
    options: argparse.Namespace, settings: FinetuneSettings, accelerator: Accelerator, work: Path
) -> Job:
    """Raises ValueError: SOURCE, PLACE and settings do not go together; the text says why."""
    leads, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    source = read_source(options, work / "source", leads, wait)
    images = getattr(options, "images", None)
    shards = as_shards(options.data, work / "data", leads, wait, images)
    test = options.test and as_shards(options.test, work / "test", leads, wait, images)
    image = ImageSettings(
        **{
            "size": source.size,
            "mean": source.mean,
            "std": source.std,
            "scale": (0.5, 1.0),
            **settings.image,
        }
    )
    if not image.fixed_size:
        raise ValueError(f"image.mode={image.mode}: classes of transformers take one size")
    held_out = image.model_copy(update={"mode": "center_crop"})
    make = _classify if options.kind == "classify" else _caption
    return make(options, settings, accelerator, source, shards, test or None, image, held_out)


def _classify(options, settings, accelerator, source, shards, test, image, held_out) -> Job:
    train_set = ShardSet.open(shards)
    test_set = ShardSet.open(test) if test else train_set
    labels = labels_of(train_set, options.label_source)
    rows = split_rows(labels, 0.0 if test else settings.holdout, options.per_class, settings.seed)
    test_rows = labels_of(test_set, options.label_source) >= 0 if test else rows.test
    without = int((labels < 0).sum())
    if without and accelerator.is_main_process:
        where = options.label_source
        print(f"{without} of {len(labels)} samples have no class at {where}: left out", flush=True)
    names = class_names(shards) or [str(n) for n in range(int(labels.max()) + 1)]
    if test and (other := class_names(test)) and other != names:
        raise ValueError(f"--test has the classes {other}, --data {names}: pack them with one list")
    mixing = None
    if settings.mixup or settings.cutmix:
        mixing = MixingSettings(mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix)
    data = LabelDataSettings(
        shards=shards,
        image=image,
        label_source=options.label_source,
        classes=len(names),
        mixing=mixing,
        unlabelled="fault",
    )
    judged = data.model_copy(update={"image": held_out, "mixing": None})
    batch, micro = _batches(settings, int(rows.train.sum()), accelerator.num_processes)
    task = Classify(
        build_classifier(source, names, settings.seed),
        training_stream(
            train_set, rows.train, LabelProcessor(data, train=True), settings.seed, batch, micro
        ),
        test_stream(test_set, test_rows, LabelProcessor(judged, train=False), max(micro, 64)),
        image,
        settings,
        options.probe,
    )
    return Job(source, shards, task, data, names, held_out)


def _caption(options, settings, accelerator, source, shards, test, image, held_out) -> Job:
    for name in ("mixup", "cutmix"):
        if getattr(settings, name):
            raise ValueError(f"{name}={getattr(settings, name)}: captions cannot be mixed")
    train_set = ShardSet.open(shards)
    test_set = ShardSet.open(test) if test else train_set
    everyone = np.zeros(len(train_set), np.int64)
    rows = split_rows(everyone, 0.0 if test else settings.holdout, None, settings.seed)
    test_rows = np.ones(len(test_set), bool) if test else rows.test
    captions = options.caption_source or source.record.get("caption_source") or ["txt"]
    if options.data.endswith(".json"):
        captions = options.caption_source or ["json:captions"]
    data = CaptionDataSettings(
        shards=shards, image=image, caption_source=captions, text_length=options.text_length
    )
    judged = data.model_copy(update={"image": held_out})
    tokenizer = Tokenizer.load(source.folder)
    batch, micro = _batches(settings, int(rows.train.sum()), accelerator.num_processes)
    task = Caption(
        build_captioner(source, settings.seed),
        tokenizer,
        training_stream(
            train_set,
            rows.train,
            CaptionProcessor(data, tokenizer, train=True),
            settings.seed,
            batch,
            micro,
        ),
        test_stream(
            test_set, test_rows, CaptionProcessor(judged, tokenizer, train=False), max(micro, 16)
        ),
        image,
        settings,
    )
    return Job(source, shards, task, data, [], held_out)


def _batches(settings: FinetuneSettings, samples: int, world: int) -> tuple[int, int]:
    """Global batch and micro-batch, both even."""
    if samples < 2:
        raise ValueError(f"{samples} samples to learn from: that is too few")
    batch = min(settings.batch, samples - samples % 2)
    share = -(-batch // (2 * world)) * 2
    return batch, min(settings.micro_batch or share, share)
