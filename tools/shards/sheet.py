"""`python -m tools.shards sheet`: a few samples as one picture, with captions, boxes and labels."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.images.decode import DecodeError, decode, read_header
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.samples.caption_texts import CaptionSource
from data_pipeline.samples.labels import LabelSource
from data_pipeline.samples.members import AbsentValue, bad, check_source
from data_pipeline.samples.objects import ObjectSource
from data_pipeline.samples.pictures import PictureDataSettings
from data_pipeline.shards.names import Catalogue
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import folder_of
from data_pipeline.storage.remote import UrlStorage
from tools.support.arguments import positive
from tools.support.contact_sheet import Box, Cell, contact_sheet

# Where captions are looked for if nobody says.
_CAPTION_SOURCES = ("txt", "json:captions", "json:caption")
_ANY_CLASS = 1 << 31


def add_command(commands: Any, text: str) -> None:
    """Add `sheet` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("sheet", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument(
        "--caption-source",
        help="as in recipes: txt or json:KEY (default: txt, json:captions or json:caption, if any)",
    )
    parser.add_argument("--count", type=positive, default=16, help="samples (default %(default)s)")
    parser.add_argument("--columns", type=positive, default=4, help="(default %(default)s)")
    parser.add_argument("--font", help="TrueType file, for scripts that the built-in font lacks")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.caption_source is not None:
        check_source("--caption-source", options.caption_source)
    shards = ShardSet.open(options.shards)
    found = list(cells_of_shards(shards, options.caption_source, options.count))
    cells = [cell for cell in found if isinstance(cell, Cell)]
    faults = [fault for fault in found if isinstance(fault, BadSample)]
    if faults:
        print(
            f"left out {len(faults)} of {len(found)} samples; first: {faults[0]}", file=sys.stderr
        )
    if not cells:
        raise ShardError("none of the samples could be drawn")
    sheet = contact_sheet(
        cells,
        title=" ".join(options.shards),
        subtitle=f"{len(cells)} of {len(shards):,} samples",
        columns=options.columns,
        font=options.font,
    )
    sheet.save(options.out)
    print(f"{options.out}: {len(cells)} pictures", file=sys.stderr)
    return 0


def cells_of_shards(shards: ShardSet, source: str | None, count: int) -> Iterator[Cell | BadSample]:
    """Cells of `count` samples spread evenly over the shards, or what is wrong with one.

    Args: source: of captions, see CaptionDataSettings; None: where there are any.
    """
    classes = _classes(shards)
    count = min(count, len(shards))
    with SampleReader(shards) as reader:
        for place in range(count):
            try:
                sample = reader.read(place * len(shards) // count)
                yield Cell(
                    _image(sample),
                    ": ".join(filter(None, (_label(sample, classes), sample.key))),
                    None,
                    _captions(sample, source),
                    _boxes(sample, classes),
                )
            except BadSample as fault:
                yield fault


def _image(sample: Sample) -> np.ndarray:
    """Decode the image of a sample, or the first of its frames."""
    settings = PictureDataSettings(shards=["-"])
    known = settings.image_extensions
    frames = sorted(name for name in sample.members if name.rpartition(".")[2] in known)
    names = [name for name in known if name in sample.members] or frames
    if not names:
        raise bad(sample, "has no image")
    data = sample.members[names[0]]
    try:
        return np.array(decode(data, read_header(data, settings.image.max_pixels)))
    except DecodeError as error:
        raise bad(sample, str(error)) from error


def _captions(sample: Sample, source: str | None) -> list[str]:
    if source is not None:
        return CaptionSource(source).read(sample)
    for place in _CAPTION_SOURCES:
        try:
            return CaptionSource(place).read(sample)
        except BadSample:
            continue
    return []


def _label(sample: Sample, classes: list[str]) -> str:
    for place in ("cls", "json:label"):
        try:
            return _name(LabelSource(place, _ANY_CLASS).read(sample), classes)
        except BadSample:
            continue
    return ""


def _boxes(sample: Sample, classes: list[str]) -> list[Box]:
    try:
        objects = ObjectSource("json", _ANY_CLASS).read(sample)
    except AbsentValue:
        return []
    pairs = zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)
    return [Box(corners, _name(label, classes), label) for corners, label in pairs]


def _name(label: int, classes: list[str]) -> str:
    return classes[label] if label < len(classes) else f"class {label}"


def _classes(shards: ShardSet) -> list[str]:
    """Return the class names of the first manifest that has any."""
    catalogue = Catalogue(UrlStorage())
    folders = dict.fromkeys(folder_of(shard.path) for shard in shards.shards)
    manifests = [catalogue.manifest(folder) for folder in folders]
    return next((m.classes for m in manifests if m is not None and m.classes), [])
