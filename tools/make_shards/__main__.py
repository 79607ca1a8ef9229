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
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.console import parse_in_any_order
from data_pipeline.shards.packing import PackJob, plan_ranges
from tools.make_shards import (
    frames as pack_frames,
)
from tools.make_shards import (
    img2dataset as pack_img2dataset,
)
from tools.make_shards import (
    parquet as pack_parquet,
)
from tools.make_shards import (
    scenes as digit_scenes,
)
from tools.make_shards import (
    text as pack_text,
)
from tools.make_shards import (
    tsv as pack_tsv,
)
from tools.make_shards import (
    voc_yolo as pack_boxes,
)
from tools.make_shards.checked_boxes import add_on_bad_box
from tools.make_shards.coco import coco_source
from tools.make_shards.options import (
    add_classes,
    add_image_source,
    add_source,
    classes_of,
    command_of,
    image_job,
    refuse_shrinking,
)
from tools.make_shards.run import run_jobs
from tools.make_shards.sources import folder_source
from tools.make_shards.tables import table_source
from tools.support.arguments import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 after an error that was printed."""
    options = parse_in_any_order(_parser(), arguments)
    return run_jobs(lambda: [options.run(options)], options.processes)


def _scenes_job(options: argparse.Namespace) -> PackJob:
    return PackJob(
        folder=options.out / options.split,
        prefix=options.split,
        keys=[f"{number:09d}" for number in range(options.count)],
        items=range(options.count),
        ranges=plan_ranges((0 for _ in range(options.count)), options.max_samples),
        build=digit_scenes.BuildScene(
            options.split, options.seed, options.size, options.two_digit_share, options.large
        ),
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
    drop = options.on_bad_box == "drop"
    source = coco_source(options.images, options.captions, options.instances, drop=drop)
    return image_job(options, source)


def _table_job(options: argparse.Namespace) -> PackJob:
    source = table_source(
        options.table,
        image_field=options.image_field,
        root=options.images,
        label_field=options.label_field,
        number_fields=options.number_fields,
        classes=classes_of(options),
        quoted=options.quoted,
    )
    return image_job(options, source)


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
    scenes.add_argument(
        "--large", action="store_true", help="one digit of two thirds of the side, easier to read"
    )

    folder = add_image_source(sources, "folder", "image folder, sub-folder = class", _folder_job)
    folder.add_argument("--images", type=Path, required=True, help="folder with the classes")
    add_classes(folder)

    coco = add_image_source(sources, "coco", "images with COCO annotations", _coco_job)
    coco.add_argument("--images", type=Path, required=True, help="folder of the file names")
    coco.add_argument("--captions", type=Path, help="captions JSON")
    coco.add_argument("--instances", type=Path, help="instances JSON: boxes and masks")
    add_on_bad_box(coco)

    table = add_image_source(sources, "table", "CSV, TSV or JSON lines of image paths", _table_job)
    table.add_argument("--table", type=Path, required=True)
    table.add_argument("--image-field", default="file", help="field with the image path")
    table.add_argument("--images", type=Path, help="what paths are relative to; default: the table")
    table.add_argument("--label-field", help="field with the class name")
    add_classes(table)
    table.add_argument(
        "--quoted", action="store_true", help="texts of a TSV may stand in quotes, as in a CSV"
    )
    table.add_argument(
        "--number-fields", nargs="+", default=[], metavar="NAME", help="CSV fields with numbers"
    )
    for module in (pack_tsv, pack_img2dataset, pack_boxes, pack_frames, pack_parquet, pack_text):
        module.add_sources(sources)
    return parser


if __name__ == "__main__":
    sys.exit(main())
