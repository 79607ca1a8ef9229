"""Options that the sources of make_shards share, and the job that packs a list of images."""

import argparse
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.images.decode import MAX_PIXELS
from data_pipeline.plain_text import read_names, read_text
from data_pipeline.shards.packing import Build, PackJob, SampleFault, plan_ranges
from tools.make_shards.images import BuildImage, item_bytes
from tools.make_shards.sources import Source, check_missing
from tools.support.arguments import natural, positive

# Options that do not change what is packed; they stay out of the command in the manifest.
_INCIDENTAL = {"command", "out", "processes", "run", "source", "shards"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def image_job(
    options: argparse.Namespace,
    source: Source,
    build: Build | None = None,
    bytes_of: Callable[[Any, int], int] = item_bytes,
) -> PackJob:
    """Return the job that packs a list of images, shuffled by the seed.

    Args: build: what makes samples of the source's items (default: BuildImage); bytes_of: an upper
    bound of what an item takes in a tar, from the item and the samples per bundle.
    Errors: SampleFault naming the images that are missing, unless they may be left out.
    """
    check_missing(source, allowed=options.on_missing == "skip")
    source.check_rows()
    if not source.items:
        raise SampleFault(f"none of the {len(source.missing)} images is there")
    # Shuffled before packing: samples that lie together in a shard are then not alike.
    order = np.random.Generator(np.random.Philox(options.seed)).permutation(len(source.items))
    unique = unique_keys([item.key for item in source.items])
    items = [source.items[number] for number in order]
    sizes = (bytes_of(item, options.bundle) for item in items)
    return PackJob(
        folder=options.out / options.split,
        prefix=options.split,
        keys=[unique[number] for number in order],
        items=items,
        ranges=plan_ranges(sizes, options.max_samples, options.max_bytes),
        build=build or BuildImage(options.short_side, options.max_pixels or MAX_PIXELS),
        skip_faults=options.on_missing == "skip",
        bundle=options.bundle,
        licence=licence_of(options) or source.licence,
        command=command_of(options),
        classes=source.classes,
        details={"seed": options.seed, "missing": len(source.missing), **source.details},
        account={"rows": source.read, **source.account},
        missing=source.missing,
    )


def unique_keys(wanted: Sequence[str]) -> list[str]:
    """Return keys without dots in their last part, and each once.

    Of those that would be one key (`x.1` and `x_1`, or a name in two formats) only the first stays
    as it is, unless another item wants exactly that; the others get a number.
    """
    plain = [_without_dots(key) for key in wanted]
    counts = Counter(plain)
    taken = {key for key, count in counts.items() if count == 1}
    keys = []
    for key in plain:
        number = 1
        chosen = key
        while counts[key] > 1 and chosen in taken:
            number += 1
            chosen = f"{key}-{number}"
        taken.add(chosen)
        keys.append(chosen)
    return keys


def _without_dots(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "_")


def refuse_shrinking(options: argparse.Namespace, what: str) -> None:
    """Raise ValueError for --short-side, which would leave boxes where they were."""
    if options.short_side is not None:
        raise ValueError(
            f"--short-side with {what}: boxes and masks are in pixels of the original images; "
            "leave resizing to the loader"
        )


def command_of(options: argparse.Namespace, tool: str = "make_shards") -> str:
    """Return the command that makes the same bytes again, without incidental options.

    The positional arguments are `source` and, where there are any, `shards`.
    """
    words = ["python", "-m", f"tools.{tool}", options.source, *getattr(options, "shards", ())]
    for name, value in sorted(vars(options).items()):
        if name in _INCIDENTAL or value is None or value is False or value == []:
            continue
        if isinstance(value, dict):
            value = ",".join(f"{key}={share:g}" for key, share in value.items())
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def licence_of(options: argparse.Namespace) -> str:
    """Return the text of --licence, "" if it was not given."""
    if options.licence and options.licence.startswith("@"):
        return read_text(options.licence[1:]).strip()
    return options.licence or ""


def classes_of(options: argparse.Namespace) -> list[str] | None:
    """Return the lines of the file that --classes names, None if it was not given."""
    if options.classes is None:
        return None
    return read_names(options.classes)


def split_name(text: str) -> str:
    """Parse the name of a split: a folder in OUT, and how its shards begin."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '_', '-' and '.'")
    return text


def byte_count(text: str) -> int:
    """Parse "500m" or "1.5G" (decimal units)."""
    number, unit = text.lower().rstrip("b"), ""
    if number and number[-1] in "kmg":
        number, unit = number[:-1], number[-1]
    try:
        count = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500M or 1.5G") from None
    return count


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add --classes, for `classes_of`."""
    parser.add_argument("--classes", type=Path, help="text file: class names in label order")


def add_packing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of everything that packs."""
    parser.add_argument("--out", type=Path, required=True, help="shards go to OUT/SPLIT")
    parser.add_argument("--seed", type=natural, default=0, help="of the shuffle (default 0)")
    parser.add_argument(
        "--max-samples", type=positive, default=10_000, help="per shard (default %(default)s)"
    )
    parser.add_argument(
        "--bundle",
        type=positive,
        default=1,
        help="samples per member of the tar, for tiny images (default %(default)s: a member each)",
    )
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="(default %(default)s)"
    )


def add_source(sources: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """Add a sub-command with the options of all sources; run(options) returns its PackJob."""
    parser = sources.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    add_packing_options(parser)
    return parser


def add_data_source(sources: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """Add a sub-command as add_source, with the options of all sources of people's own data."""
    parser = add_source(sources, name, text, run)
    parser.add_argument(
        "--split", type=split_name, default="train", help="its name (default %(default)s)"
    )
    parser.add_argument("--max-bytes", type=byte_count, help="per shard, e.g. 500M")
    parser.add_argument("--licence", help="licence text for the manifest, or @FILE")
    parser.add_argument(
        "--on-missing",
        choices=("error", "skip"),
        default="error",
        help="what to do with missing and unusable input (default %(default)s)",
    )
    return parser


def add_image_source(sources: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """Add a sub-command as add_data_source, with the options of all sources of images."""
    parser = add_data_source(sources, name, text, run)
    parser.add_argument("--short-side", type=positive, help="shrink images to this many pixels")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        help=f"of an image; as image.max_pixels of the loader (default {MAX_PIXELS:,})",
    )
    return parser
