"""Pack images and what is known about them into WebDataset shards.

    python -m tools.make_shards scenes --out data/scenes --count 20000
    python -m tools.make_shards folder --out data/flowers --images flowers/
    python -m tools.make_shards coco   --out data/coco --images train2017/ \
        --captions captions_train2017.json --instances instances_train2017.json
    python -m tools.make_shards table  --out data/web --table pairs.csv --image-field path

Shards, their indices and manifest.json go to OUT/SPLIT. Run the same command again after an
interruption: finished shards are checked and kept.
"""

import argparse
import errno
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_pipeline.packing import Build, PackJob, PackResult, SampleFault, pack, plan_ranges
from data_pipeline.tar_headers import ShardError
from tools import digit_scenes
from tools.pack_coco import coco_source
from tools.pack_sources import (
    BuildImage,
    Source,
    check_missing,
    folder_source,
    item_bytes,
    table_source,
)

# Options that do not change what is packed; they stay out of the command in the manifest.
_INCIDENTAL = {"out", "processes", "run"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
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
        licence=digit_scenes.LICENCE,
        command=_command(options),
        classes=list(digit_scenes.DIGIT_WORDS),
        details={"seed": options.seed},
    )


def _folder_job(options: argparse.Namespace) -> PackJob:
    return _image_job(options, folder_source(options.images, _class_list(options)))


def _coco_job(options: argparse.Namespace) -> PackJob:
    if options.short_side is not None and options.instances is not None:
        raise ValueError(
            "--short-side with --instances: boxes and masks are in pixels of the original images; "
            "leave resizing to the loader"
        )
    return _image_job(options, coco_source(options.images, options.captions, options.instances))


def _table_job(options: argparse.Namespace) -> PackJob:
    source = table_source(
        options.table,
        image_field=options.image_field,
        root=options.images,
        label_field=options.label_field,
        number_fields=options.number_fields,
        classes=_class_list(options),
    )
    return _image_job(options, source)


def _image_job(options: argparse.Namespace, source: Source) -> PackJob:
    check_missing(source, allowed=options.on_missing == "skip")
    if not source.items:
        raise SampleFault(f"none of the {len(source.missing)} images is there")
    # Shuffled before packing: samples that lie together in a shard are then not alike.
    order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(source.items))
    items = [source.items[number] for number in order]
    build: Build = BuildImage(options.short_side)
    return PackJob(
        folder=options.out / options.split,
        prefix=options.split,
        keys=[item.key for item in items],
        items=items,
        ranges=plan_ranges(map(item_bytes, items), options.max_samples, options.max_bytes),
        build=build,
        skip_faults=options.on_missing == "skip",
        licence=_licence(options) or source.licence,
        command=_command(options),
        classes=source.classes,
        details={"seed": options.seed, "missing": len(source.missing)},
    )


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
    if not manifest.licence:
        console.print("no licence given: --licence records it in the manifest", highlight=False)


def _command(options: argparse.Namespace) -> str:
    """Return the command that makes the same bytes again, without incidental options."""
    words = ["python", "-m", "tools.make_shards", options.source]
    for name, value in sorted(vars(options).items()):
        if name in _INCIDENTAL | {"source"} or value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _licence(options: argparse.Namespace) -> str:
    if options.licence and options.licence.startswith("@"):
        return Path(options.licence[1:]).read_text(encoding="utf-8").strip()
    return options.licence or ""


def _class_list(options: argparse.Namespace) -> list[str] | None:
    if options.classes is None:
        return None
    return [line for line in options.classes.read_text(encoding="utf-8").splitlines() if line]


def _positive(text: str) -> int:
    """Parse a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _split_name(text: str) -> str:
    """Parse the name of a split: a folder in OUT, and how its shards begin."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '_', '-' and '.'")
    return text


def _byte_count(text: str) -> int:
    """Parse "500m" or "1.5G" (decimal units)."""
    number, unit = text.lower().rstrip("b"), ""
    if number and number[-1] in "kmg":
        number, unit = number[:-1], number[-1]
    try:
        count = int(float(number) * _UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500M or 1.5G") from None
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = parser.add_subparsers(dest="source", required=True)
    scenes = _add_source(sources, "scenes", "generated digit scenes, no input needed", _scenes_job)
    scenes.add_argument("--split", choices=digit_scenes.SPLITS, default="train")
    scenes.add_argument("--count", type=_positive, default=20_000, help="number of scenes")
    scenes.add_argument("--size", type=_positive, default=64, help="side of the images in pixels")
    scenes.add_argument("--two-digit-share", type=float, default=0.5, help="of all scenes")

    folder = _add_image_source(sources, "folder", "image folder, sub-folder = class", _folder_job)
    folder.add_argument("--images", type=Path, required=True, help="folder with the classes")
    folder.add_argument("--classes", type=Path, help="text file: class names in label order")

    coco = _add_image_source(sources, "coco", "images with COCO annotations", _coco_job)
    coco.add_argument("--images", type=Path, required=True, help="folder of the file names")
    coco.add_argument("--captions", type=Path, help="captions JSON")
    coco.add_argument("--instances", type=Path, help="instances JSON: boxes and masks")

    table = _add_image_source(sources, "table", "CSV, TSV or JSON lines of image paths", _table_job)
    table.add_argument("--table", type=Path, required=True)
    table.add_argument("--image-field", default="file", help="field with the image path")
    table.add_argument("--images", type=Path, help="what paths are relative to; default: the table")
    table.add_argument("--label-field", help="field with the class name")
    table.add_argument("--classes", type=Path, help="text file: class names in label order")
    table.add_argument(
        "--number-fields", nargs="+", default=[], metavar="NAME", help="CSV fields with numbers"
    )
    return parser


def _add_source(sources: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, required=True, help="shards go to OUT/SPLIT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-samples", type=_positive, default=10_000, help="per shard (default %(default)s)"
    )
    parser.add_argument(
        "--processes", type=_positive, default=os.cpu_count() or 1, help="(default %(default)s)"
    )
    return parser


def _add_image_source(sources: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = _add_source(sources, name, text, run)
    parser.add_argument(
        "--split", type=_split_name, default="train", help="its name (default %(default)s)"
    )
    parser.add_argument("--max-bytes", type=_byte_count, help="per shard, e.g. 500M")
    parser.add_argument("--short-side", type=_positive, help="shrink images to this many pixels")
    parser.add_argument("--licence", help="licence text for the manifest, or @FILE")
    parser.add_argument(
        "--on-missing",
        choices=("error", "skip"),
        default="error",
        help="what to do with missing and unusable images (default %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
