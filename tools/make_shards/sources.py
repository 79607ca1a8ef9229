"""What make_shards packs: lists of items, and the folders of images with a class each."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.shards.packing import SampleFault
from tools.make_shards.images import ImageItem
from tools.make_shards.walk import is_passed_over, walk_images

_FAULTS_SHOWN = 5
_FOLDERS_SHOWN = 20


@dataclass(frozen=True)
class Source:
    """Items in a reproducible order, and what holds for all of them."""

    items: list[Any]
    """ImageItems, or others that have `key`."""
    classes: list[str] | None = None
    licence: str = ""
    missing: list[str] = field(default_factory=list)
    """A line for each image that was asked for and is not there, or is there and not described."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the manifest shall remember of the input, and the report shows: counts by name."""
    account: dict[str, Any] = field(default_factory=dict)
    """As `details`, for what does not change the samples: files that were passed over."""
    rows: int | None = None
    """How many rows, files or entries were read; None: as many as are in `items` and `missing`."""
    left_out: int = 0
    """How many of them are left out on purpose, and counted in `details`."""

    @property
    def read(self) -> int:
        """How many rows, files or entries were read."""
        return len(self.items) + len(self.missing) if self.rows is None else self.rows

    def check_rows(self) -> None:
        """Raise RuntimeError if a row that was read is neither packed nor named nor counted."""
        known = len(self.items) + len(self.missing) + self.left_out
        if known != self.read:
            raise RuntimeError(
                f"{self.read} rows were read, and only {known} of them are accounted for: nothing "
                "is packed; please report this with the command"
            )


def check_missing(source: Source, allowed: bool) -> None:
    """Raise SampleFault naming the missing images, unless they may be left out."""
    if source.missing and not allowed:
        raise SampleFault(
            f"{len(source.missing)} images are missing:{listed(source.missing)}\n"
            "(--on-missing skip leaves them out)"
        )


def listed(faults: Sequence[str]) -> str:
    """The first faults, a line each, and how many more there are."""
    more = len(faults) - _FAULTS_SHOWN
    lines = [*faults[:_FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def folder_source(root: Path, classes: Sequence[str] | None = None) -> Source:
    """List an image folder in which each sub-folder is a class.

    What takes part is decided by pack_walk; folders without images are no classes, unless
    `classes` names them.

    Args: classes: names in label order; None: the sub-folders with images, sorted.
    Errors: ValueError if there is no sub-folder or no image, or one that `classes` lacks.
    """
    tree = walk_images(root)
    paths = [path for path in tree.files if len(path.parts) > 1]
    for path in tree.files:
        if len(path.parts) == 1:
            tree.pass_over("in no class folder", path)
    found = sorted({path.parts[0] for path in paths})
    names = list(classes) if classes is not None else found
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{root}: sub-folders {unknown} are not in the list of classes")
    folders = [e.name for e in os.scandir(root) if e.is_dir() and not is_passed_over(e.name)]
    if not folders:
        raise ValueError(
            f"{root}: has no sub-folders; each sub-folder is a class. For images without "
            "classes list them in a table (make_shards table --help)"
        )
    if not paths:
        raise ValueError(f"{root}: no image in its sub-folders; passed over: {tree.account()}")
    empty = sorted(set(folders) - set(found))
    account = {
        "passed_over": tree.account(),
        "folders_without_images": empty[:_FOLDERS_SHOWN] + ["..."] * (len(empty) > _FOLDERS_SHOWN),
    }
    labels = {name: label for label, name in enumerate(names)}
    items, missing = stat_items(
        (
            key,
            root / name,
            {"file": name.as_posix(), "class": name.parts[0]},
            labels[name.parts[0]],
            f"{root}",
        )
        for key, name in zip(keys_of(paths), paths, strict=True)
    )
    return Source(items, classes=names, missing=missing, account=account, rows=len(paths))


def stat_items(
    described: Iterable[tuple[str, Path, dict[str, Any], int | None, str]],
) -> tuple[list[ImageItem], list[str]]:
    """Turn (key, path, record, label, origin) into items; list the images that do not exist."""
    items, missing = [], []
    for key, path, record, label, origin in described:
        try:
            size = path.stat().st_size
        except OSError as error:
            missing.append(f"{origin}: {path}: {error.strerror}")
            continue
        items.append(ImageItem(key, os.fspath(path), size, record, label, origin))
    return items, missing


def keys_of(paths: Sequence[Path]) -> list[str]:
    """Return unique keys that look like the paths: without suffix, and without dots in the name."""
    keys = [path.with_name(path.stem.replace(".", "_")).as_posix() for path in paths]
    repeated = {key for key, count in Counter(keys).items() if count > 1}
    return [
        f"{key}_{path.suffix[1:].lower()}" if key in repeated else key
        for key, path in zip(keys, paths, strict=True)
    ]
