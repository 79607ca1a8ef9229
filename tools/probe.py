"""Judge the image encoder of a run by its frozen features: nearest neighbours and a linear probe.

    python -m tools.probe runs/my_run --train data/flowers/train --test data/flowers/val --classes 5

RUN is a run directory or one of its checkpoints; any encoder that reads images can be judged,
whatever task has trained it. Images are prepared as in the evaluation of the task that reads it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_pipeline.console import parse_in_any_order, write_utf8
from tools.support.arguments import add_device, add_weights, device_of, natural, positive

if TYPE_CHECKING:  # --help and wrong arguments do without torch
    from torch import Tensor

    from data_pipeline.images.transforms import ImageSettings
    from tools.support.trained import TrainedRun

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    write_utf8()
    parser = _parser()
    args = parse_in_any_order(parser, arguments)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    from pretrain.objectives.probing import knn_top1, linear_top1
    from tools.support.trained import open_run

    try:
        run = open_run(args.run, args.weights)
        name, image = choose_encoder(run, args.encoder)
        parts = [features(run, name, image, shards, args) for shards in (args.train, args.test)]
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    (train, train_labels), (test, test_labels) = parts
    linear, strength = linear_top1(train, train_labels, test, test_labels)
    found = {
        "encoder": name,
        "step": run.manifest["step"],
        "weights": run.state,
        "train_images": len(train),
        "test_images": len(test),
        "knn_top1": knn_top1(train, train_labels, test, test_labels, neighbours=args.neighbours),
        "linear_top1": linear,
        "linear_strength": strength,
    }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        f"{name} at step {found['step']}: kNN {found['knn_top1']:.4f}, linear probe "
        f"{linear:.4f} on {len(test)} images ({len(train)} to learn from)"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run directory or checkpoint")
    parser.add_argument("--train", nargs="+", required=True, help="labelled shards to learn from")
    parser.add_argument("--test", nargs="+", required=True, help="labelled shards to judge on")
    parser.add_argument("--classes", type=positive, required=True, help="number of classes")
    parser.add_argument("--label-source", default="cls", help="as in recipes (default: cls)")
    parser.add_argument("--encoder", help="name of the encoder, if the run has several")
    parser.add_argument(
        "--pool",
        choices=("mean", "class_token", "head"),
        default="mean",
        help="what an image is: the mean of its tokens, the first one, or what "
        "the encoder's own head makes of them",
    )
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--neighbours", type=positive, default=20, help="that vote (default: 20)")
    parser.add_argument("--batch", type=positive, default=64, help="images at a time")
    parser.add_argument("--workers", type=natural, default=2, help="processes that decode")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def choose_encoder(run: "TrainedRun", wanted: str | None) -> "tuple[str, ImageSettings]":
    """Name of the encoder, and how its images are prepared.

    Raises ValueError: the run has no such encoder of images, or several to choose from.
    """
    from pretrain.build import evaluation_image

    readers = {
        getattr(task.objective, field): task
        for task in run.recipe.tasks.values()
        for field, reads in task.objective.encoder_fields.items()
        if reads == "images"
    }
    if wanted is None and len(readers) == 1:
        wanted = next(iter(readers))
    if not readers:
        raise ValueError("no task of the run reads images: there is nothing to probe")
    if wanted not in readers:
        raise ValueError(
            f"choose one of the run's encoders of images with --encoder: {', '.join(readers)}"
        )
    return wanted, evaluation_image(readers[wanted])


def features(
    run: "TrainedRun",
    name: str,
    image: "ImageSettings",
    shards: list[str],
    args: argparse.Namespace,
) -> "tuple[Tensor, Tensor]":
    """Pooled features (N, width) float32 and labels (N,) int64 of all labelled images of
    `shards`."""
    import torch

    from data_pipeline.loader.loader import EvaluationLoader, TaskStream
    from data_pipeline.reading.reader import SampleReader
    from data_pipeline.samples.labels import NO_LABEL, LabelDataSettings, LabelProcessor
    from data_pipeline.shards.shard_set import ShardSet
    from pretrain.models.pixels import normalise_pixels
    from pretrain.objectives.image_tokens import image_vectors, vector_width

    device = device_of(args.device)
    data = LabelDataSettings(
        shards=shards, image=image, label_source=args.label_source, classes=args.classes
    )
    encoder = run.model.encoders[name].to(device)
    vector_width(encoder, args.pool)  # or an error that says why not
    batch_size = 1 if image.mode == "keep_aspect" else args.batch
    stream = TaskStream(
        "probe",
        SampleReader(ShardSet.open(shards)),
        None,
        LabelProcessor(data, train=False),
        0,
        batch_size,
        batch_size,
    )
    loader = EvaluationLoader(stream, 0, 1, workers=args.workers)
    pieces, labels = [], []
    with torch.no_grad(), console.status(f"features of {len(ShardSet.open(shards))} images"):
        for batch in loader:
            pixels = normalise_pixels(
                batch["images"].to(device), image.mean, image.std, encoder.dtype
            )
            known = batch["labels"] != NO_LABEL
            vectors = image_vectors(encoder, pixels, args.pool, draws=None)
            pieces.append(vectors.float().cpu()[known])
            labels.append(batch["labels"][known])
    if not sum(map(len, pieces)):
        raise ValueError(f"{', '.join(shards)}: no sample has a label at {args.label_source}")
    return torch.cat(pieces), torch.cat(labels)


if __name__ == "__main__":
    sys.exit(main())
