"""What make_shards packs: image folders and tables (COCO: pack_coco.py), as lists of items."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.packing import SampleFault
from tools.pack_images import IMAGE_SUFFIXES, ImageItem, is_utf8

_FAULTS_SHOWN = 5


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


def check_missing(source: Source, allowed: bool) -> None:
    """Raise SampleFault naming the missing images, unless they may be left out."""
    if source.missing and not allowed:
        shown = "\n  ".join(source.missing[:_FAULTS_SHOWN])
        more = len(source.missing) - _FAULTS_SHOWN
        raise SampleFault(
            f"{len(source.missing)} images are missing:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\n(--on-missing skip leaves them out)"
        )


def folder_source(root: Path, classes: Sequence[str] | None = None) -> Source:
    """List an image folder in which each sub-folder is a class.

    Args: classes: names in label order; None: the sub-folders, sorted.
    Errors: ValueError if there is no sub-folder or no image, or one that `classes` lacks.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: is not a folder")
    found = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    names = list(classes) if classes is not None else found
    unknown = sorted(set(found) - set(names))
    if not found or unknown:
        raise ValueError(
            f"{root}: sub-folders {unknown} are not in the list of classes"
            if unknown
            else f"{root}: has no sub-folders; each sub-folder is a class. For images without "
            "classes list them in a table (make_shards table --help)"
        )
    paths = [
        path
        for name in found
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.is_dir()
    ]
    for path in paths:
        if not is_utf8(os.fspath(path)):
            raise ValueError(f"{os.fsencode(path)!r}: its name is not UTF-8: rename it")
    if not paths:
        raise ValueError(f"{root}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    relative = [path.relative_to(root) for path in paths]
    items, missing = stat_items(
        (
            key,
            path,
            {"file": name.as_posix(), "class": name.parts[0]},
            names.index(name.parts[0]),
            f"{root}",
        )
        for key, path, name in zip(keys_of(relative), paths, relative, strict=True)
    )
    return Source(items, classes=names, missing=missing)


def table_source(
    table: Path,
    *,
    image_field: str,
    root: Path | None = None,
    label_field: str | None = None,
    number_fields: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Source:
    """Read a table of image paths and fields: .csv, .tsv (with a header line) or .jsonl.

    All fields go into the json member; those of a CSV are strings, unless in `number_fields`.

    Args: root: what relative paths are relative to (default: the folder of the table);
    label_field: field with the class name; classes: names in label order (default: sorted).
    Errors: ValueError naming table and row.
    """
    root = root or table.parent
    try:
        rows = list(_rows(table, number_fields))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: is not UTF-8 text: {error}") from None
    if not rows:
        raise ValueError(f"{table}: has no rows")
    names = list(classes) if classes is not None else None
    for number, row in rows:
        for name in filter(None, (image_field, label_field)):
            if row.get(name) in (None, ""):
                raise ValueError(
                    f"{table}, line {number}: no {name!r}; it has {', '.join(map(str, row))}"
                )
    if label_field is not None and names is None:
        names = sorted({str(row[label_field]) for _, row in rows})
    labels = {name: label for label, name in enumerate(names or [])}

    def describe() -> Iterator[tuple[str, Path, dict[str, Any], int | None, str]]:
        for number, row in rows:
            label = None
            if label_field is not None:
                label = labels.get(str(row[label_field]))
                if label is None:
                    raise ValueError(
                        f"{table}, line {number}: {row[label_field]!r} is not in the classes"
                    )
            record = {("file" if k == image_field else k): v for k, v in row.items()}
            path = root / str(row[image_field])
            yield f"{number:09d}", path, record, label, f"{table.name}, line {number}"

    items, missing = stat_items(describe())
    return Source(items, names if label_field is not None else None, missing=missing)


def _rows(table: Path, number_fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number in the file, fields)."""
    if table.suffix == ".jsonl":
        with open(table, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(table, number, line)
        return
    if table.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{table}: must end in .csv, .tsv or .jsonl")
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
        names = Counter(reader.fieldnames or ())
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{table}: has the fields {repeated} twice")
        unknown = sorted(set(number_fields) - set(names))
        if unknown:
            raise ValueError(f"{table}: has no fields {unknown}; it has {reader.fieldnames}")
        for row in reader:
            number = reader.line_num
            if None in row or None in row.values():
                raise ValueError(f"{table}, line {number}: not {len(reader.fieldnames)} fields")
            yield number, row | {n: _number(table, number, n, row[n]) for n in number_fields}


def _json_row(table: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{table}, line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{table}, line {number}: is not a JSON object")
    return row


def _number(table: Path, line: int, name: str, text: str) -> int | float | None:
    if not text.strip():
        return None
    try:
        return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else float(text)
    except ValueError:
        raise ValueError(f"{table}, line {line}: {name} {text!r} is not a number") from None


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
