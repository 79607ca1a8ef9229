"""The output of img2dataset (tars or files) as a list of items.

Its tars can be trained on as they are. Packing them again shuffles over all of them, gives them
indices and checksums, and leaves out what is incomplete.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.images.formats import SUFFIXES
from data_pipeline.plain_text import decoded, parsed_json
from data_pipeline.shards.index import split_name
from data_pipeline.shards.packing import PackJob
from data_pipeline.shards.tar import iter_members
from data_pipeline.storage.errors import ShardError
from tools.make_shards.images import ImageItem, beside_ours
from tools.make_shards.options import add_image_source, image_job
from tools.make_shards.sources import Source
from tools.make_shards.walk import OTHER, Found, is_passed_over

_STATS_SUFFIX = "_stats.json"
_LARGEST_TEXT = 16 << 20


class _Part(NamedTuple):
    """A member of a sample: a file, or bytes in a tar."""

    path: str
    begin: int | None
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.begin or 0)
            return file.read(self.size)


def add_sources(sources: Any) -> None:
    """Add `img2dataset` to the sub-commands of make_shards."""
    text = "what img2dataset wrote, as tars or as files"
    parser = add_image_source(sources, "img2dataset", text, _job)
    parser.add_argument("--images", type=Path, required=True, help="its output folder")


def img2dataset_source(root: Path) -> Source:
    """List the images of an output folder; the json member keeps all fields of theirs.

    Samples whose `status` is not success are passed over. Parts that are unfinished (no
    `_stats.json`), damaged, or do not have as many samples as it says are listed as missing, and
    so are samples without an image or with a broken json.

    Errors: ValueError if the folder holds no output of img2dataset.
    """
    parts = _parts(root)
    if not parts:
        raise ValueError(f"{root}: holds neither 00000.tar nor 00000/ with 00000{_STATS_SUFFIX}")
    items: list[ImageItem] = []
    missing: list[str] = []
    counts: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    passed = Found()
    read = named = 0
    for part in parts:
        stats = _stats(part, missing)
        if stats is None:
            continue
        try:
            walk = _samples_of_tar if part.suffix == ".tar" else _samples_of
            samples = list(walk(part, passed))
        except ShardError as error:
            missing.append(str(error))
            continue
        counts += Counter({k: v for k, v in stats.items() if isinstance(v, int)})
        statuses += Counter(stats.get("status_dict") or {})
        if len(samples) != stats.get("successes", len(samples)):
            missing.append(
                f"{part}: has {len(samples)} samples, and {stats['successes']} by its statistics"
            )
        read += len(samples)
        broken = len(missing)
        for key, members in samples:
            item = _item(key, members, part, counts)
            if isinstance(item, str):
                missing.append(item)
            elif item is not None:
                items.append(item)
        named += len(missing) - broken
    details = {name: counts[name] for name in sorted(counts) if name in _REPORTED}
    top = dict(statuses.most_common(10))
    return Source(
        items,
        missing=missing,
        details={"input": {**details, "status": top}},
        account={"passed_over": passed.account()},
        rows=read + len(missing) - named,  # whole parts that are missing stand for a row each
        left_out=counts["not_success"],
    )


_REPORTED = ("count", "successes", "failed_to_download", "failed_to_resize", "not_success")


def _job(options: argparse.Namespace) -> PackJob:
    return image_job(options, img2dataset_source(options.images))


def _parts(root: Path) -> list[Path]:
    """Return the tars, or the folders, in which the samples are."""
    tars = sorted(path for path in root.glob("*.tar") if not is_passed_over(path.name))
    if tars:
        return tars
    numbered = (path for path in root.glob("[0-9]*") if path.is_dir())
    return sorted(numbered) if root.is_dir() else []


def _stats(part: Path, missing: list[str]) -> dict[str, Any] | None:
    """Return the statistics of a part; without them it is not finished, and `missing` says so."""
    place = part.with_name(part.name.removesuffix(".tar") + _STATS_SUFFIX)
    try:
        stats = parsed_json(place.read_bytes())
        if not isinstance(stats, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        missing.append(f"{part}: no {place.name}: img2dataset has not finished it; start it again")
        return None
    except ValueError as error:
        missing.append(f"{place}: cannot be read: {error}")
        return None
    return stats


def _samples_of_tar(tar: Path, passed: Found) -> Iterator[tuple[str, dict[str, _Part]]]:
    key, members = None, {}
    with open(tar, "rb", buffering=1 << 20) as file:
        for member in iter_members(file, os.fspath(tar), os.fstat(file.fileno()).st_size):
            split = split_name(member.name)
            if split is None:
                passed.pass_over(OTHER, Path(member.name))
                continue
            if split[0] != key and members:
                yield key, members
                members = {}
            key = split[0]
            members[split[1]] = _Part(os.fspath(tar), member.offset, member.size)
    if members:
        yield key, members


def _samples_of(folder: Path, passed: Found) -> Iterator[tuple[str, dict[str, _Part]]]:
    samples: dict[str, dict[str, _Part]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            split = split_name(entry.name)
            if split is None or is_passed_over(entry.name) or not entry.is_file():
                passed.pass_over(OTHER, Path(entry.name))
            else:
                part = _Part(entry.path, None, entry.stat().st_size)
                samples.setdefault(split[0], {})[split[1]] = part
    yield from samples.items()


def _item(
    key: str, members: dict[str, _Part], part: Path, counts: Counter[str]
) -> ImageItem | str | None:
    """Return the item of a sample, what is wrong with it, or None if its download had failed."""
    where = f"{part.name}, {key}"
    record: dict[str, Any] = {}
    try:
        if "json" in members:
            record = _record(members["json"])
        if not isinstance(record.get("caption"), str) and "txt" in members:
            record["caption"] = decoded(members["txt"].read())
    except ValueError as error:
        return f"{where}: broken json or text: {error}"
    if record.get("status", "success") != "success":
        counts["not_success"] += 1
        return None
    images = [extension for extension in members if f".{extension}" in SUFFIXES]
    if not images:
        return f"{where}: has no image, only {', '.join(sorted(members))}"
    image = members[images[0]]
    record = beside_ours({"file": f"{part.name}/{key}.{images[0]}"}, record)
    return ImageItem(key, image.path, image.size, record, None, where, image.begin)


def _record(part: _Part) -> dict[str, Any]:
    if part.size > _LARGEST_TEXT:
        raise ValueError(f"{part.size} bytes are too many")
    record = parsed_json(part.read())
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record
