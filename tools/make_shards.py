"""Pack images and what is known about them into WebDataset shards.

    python -m tools.make_shards scenes --out data/scenes --count 20000
    python -m tools.make_shards folder --out data/flowers --images flowers/
    python -m tools.make_shards coco   --out data/coco --images train2017/ \
        --captions captions_train2017.json --instances instances_train2017.json
    python -m tools.make_shards table  --out data/web --table pairs.csv --image-field path

and so on for img2dataset, tsv, voc, yolo, frames, parquet and text: `make_shards SOURCE --help`.

Shards, their indices and manifest.json go to OUT/SPLIT. Run the same command again after an
interruption: finished shards are checked and kept.
"""

import argparse
import errno
import functools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_pipeline.packing import PackJob, PackResult, SampleFault, pack, plan_ranges
from data_pipeline.tar_headers import ShardError
from tools import (
    digit_scenes,
    pack_boxes,
    pack_frames,
    pack_img2dataset,
    pack_parquet,
    pack_text,
    pack_tsv,
)
from tools.pack_coco import coco_source
from tools.pack_options import (
    add_classes,
    add_image_source,
    add_source,
    classes_of,
    command_of,
    image_job,
    positive,
    refuse_shrinking,
)
from tools.pack_sources import folder_source, table_source

_SKIPPED_SHOWN = 10
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class BuildScene:
    """Makes the members of digit scene number `item`."""

    split: digit_scenes.Split
    seed: int
    size: int
    two_digit_share: float

    def __call__(self, item: int) -> dict[str, bytes]:
        """Draw the scene and encode it."""
        scene = digit_scenes.make_scene(
            item,
            split=self.split,
            seed=self.seed,
            size=self.size,
            two_digit_share=self.two_digit_share,
        )
        return digit_scenes.scene_members(scene)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 after an error that was printed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        job = options.run(options)
        result = _pack_with_progress(job, options.processes, console)
    except (SampleFault, ShardError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if getattr(error, "errno", None) in _DISK_FULL:
            console.print("free some space; the same command continues with the missing shards")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command continues with the shards that are missing")
        return 130
    _report(job, result, console)
    return 0


def _scenes_job(options: argparse.Namespace) -> PackJob:
    return PackJob(
        folder=options.out / options.split,
        prefix=options.split,
        keys=[f"{number:09d}" for number in range(options.count)],
        items=range(options.count),
        ranges=plan_ranges((0 for _ in range(options.count)), options.max_samples),
        build=BuildScene(options.split, options.seed, options.size, options.two_digit_share),
        bundle=options.bundle,
        licence=digit_scenes.LICENCE,
        command=command_of(options),
        classes=list(digit_scenes.DIGIT_WORDS),
        details={"seed": options.seed},
    )


def _folder_job(options: argparse.Namespace) -> PackJob:
    return image_job(options, folder_source(options.images, classes_of(options)))


def _coco_job(options: argparse.Namespace) -> PackJob:
    if options.instances is not None:
        refuse_shrinking(options, "--instances")
    return image_job(options, coco_source(options.images, options.captions, options.instances))


def _table_job(options: argparse.Namespace) -> PackJob:
    source = table_source(
        options.table,
        image_field=options.image_field,
        root=options.images,
        label_field=options.label_field,
        number_fields=options.number_fields,
        classes=classes_of(options),
    )
    return image_job(options, source)


def _pack_with_progress(job: PackJob, processes: int, console: Console) -> PackResult:
    with Progress(
        TextColumn("packing {task.fields[split]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=len(job.items), split=job.folder.name)
        return pack(job, processes=processes, progress=functools.partial(bar.advance, task))


def _report(job: PackJob, result: PackResult, console: Console) -> None:
    manifest = result.manifest
    text = (
        f"{job.folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, "
        f"{manifest.bytes / 1e6:,.1f} MB"
    )
    if result.reused_shards:
        text += f" ({result.reused_shards} shards kept from an earlier run)"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    left_out = len(result.skipped) + job.details.get("missing", 0)
    if left_out:
        shown = ", ".join(result.skipped[:_SKIPPED_SHOWN])
        console.print(
            f"left out: {left_out} items ({job.details['missing']} images missing, "
            f"{len(result.skipped)} unusable{': ' + shown if shown else ''})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for name, value in job.details.items():
        if value and name not in ("seed", "missing"):
            text = f"{name.replace('_', ' ')}: {json.dumps(value, ensure_ascii=False)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if not manifest.licence:
        console.print("no licence given: --licence records it in the manifest", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = parser.add_subparsers(dest="source", required=True)
    scenes = add_source(sources, "scenes", "generated digit scenes, no input needed", _scenes_job)
    scenes.add_argument("--split", choices=digit_scenes.SPLITS, default="train")
    scenes.add_argument("--count", type=positive, default=20_000, help="number of scenes")
    scenes.add_argument("--size", type=positive, default=64, help="side of the images in pixels")
    scenes.add_argument("--two-digit-share", type=float, default=0.5, help="of all scenes")

    folder = add_image_source(sources, "folder", "image folder, sub-folder = class", _folder_job)
    folder.add_argument("--images", type=Path, required=True, help="folder with the classes")
    add_classes(folder)

    coco = add_image_source(sources, "coco", "images with COCO annotations", _coco_job)
    coco.add_argument("--images", type=Path, required=True, help="folder of the file names")
    coco.add_argument("--captions", type=Path, help="captions JSON")
    coco.add_argument("--instances", type=Path, help="instances JSON: boxes and masks")

    table = add_image_source(sources, "table", "CSV, TSV or JSON lines of image paths", _table_job)
    table.add_argument("--table", type=Path, required=True)
    table.add_argument("--image-field", default="file", help="field with the image path")
    table.add_argument("--images", type=Path, help="what paths are relative to; default: the table")
    table.add_argument("--label-field", help="field with the class name")
    add_classes(table)
    table.add_argument(
        "--number-fields", nargs="+", default=[], metavar="NAME", help="CSV fields with numbers"
    )
    for module in (pack_tsv, pack_img2dataset, pack_boxes, pack_frames, pack_parquet, pack_text):
        module.add_sources(sources)
    return parser


if __name__ == "__main__":
    sys.exit(main())
