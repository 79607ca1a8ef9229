"""What make_shards packs: image folders and tables (COCO: pack_coco.py), as lists of items."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.packer import sample_bytes
from data_pipeline.packing import SampleFault

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # JPEG with further views behind it, from phones
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
# Room for width, height and label, which are known only when the image is read.
_JSON_RESERVE = 128
_ORIENTATION_TAG = 0x0112
_JPEG_QUALITY = 92
_FAULTS_SHOWN = 5


class ImageItem(NamedTuple):
    """One image on disk and what goes into its json member."""

    key: str
    path: str
    bytes: int
    record: dict[str, Any]
    label: int | None
    origin: str
    """Where it was asked for, for messages: "captions.json, image 785"."""


@dataclass(frozen=True)
class Source:
    """Items in a reproducible order, and what holds for all of them."""

    items: list[ImageItem]
    classes: list[str] | None = None
    licence: str = ""
    missing: list[str] = field(default_factory=list)
    """A line for each image that was asked for and is not there."""


@dataclass(frozen=True)
class BuildImage:
    """Makes the members of an ImageItem: the image as it is on disk, json, and cls if labelled."""

    short_side: int | None = None
    """Shrink so that the shorter side has this many pixels, and store as JPEG; None: copy bytes."""

    def __call__(self, item: ImageItem) -> dict[str, bytes]:
        """Return the members. Errors: SampleFault if the file is missing or not an image."""
        try:
            data = Path(item.path).read_bytes()
            if not data:
                raise ValueError("the file is empty")
            with Image.open(io.BytesIO(data)) as image:
                extension = _EXTENSIONS.get(image.format or "")
                if extension is None:
                    raise ValueError(f"format {image.format} is not supported")
                size = image.size
                data, extension, stored = self._shrunk(image, data, extension)
                turned = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
        except UnidentifiedImageError:
            raise SampleFault(f"{item.origin}: cannot use {item.path}: not an image") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SampleFault(f"{item.origin}: cannot use {item.path}: {error}") from None
        expected = item.record.get("width", size[0]), item.record.get("height", size[1])
        if expected != size and not (turned and expected == size[::-1]):
            raise SampleFault(
                f"{item.origin}: {item.path} has {size[0]} x {size[1]} pixels, but the annotations "
                f"are for {expected[0]} x {expected[1]}: not the same image"
            )
        width, height = expected if stored == size else stored
        record = {**item.record, "width": width, "height": height}
        if item.label is not None:
            record["label"] = item.label
        members = {extension: data, "json": _json_bytes(record)}
        return members if item.label is None else members | {"cls": str(item.label).encode()}

    def _shrunk(
        self, image: Image.Image, data: bytes, extension: str
    ) -> tuple[bytes, str, tuple[int, int]]:
        """Bytes, extension and size (width, height) of the image as it is stored."""
        if self.short_side is None or min(image.size) <= self.short_side:
            return data, extension, image.size
        image.draft("RGB", (2 * self.short_side, 2 * self.short_side))
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = self.short_side / min(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue(), "jpg", size


def item_bytes(item: ImageItem) -> int:
    """Return an upper bound of what the sample of an item takes in a tar."""
    json_size = len(_json_bytes(item.record)) + _JSON_RESERVE
    return sample_bytes(item.key, {"jpeg": item.bytes, "json": json_size, "cls": 8})


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
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    for path in paths:
        if not _is_utf8(os.fspath(path)):
            raise ValueError(f"{os.fsencode(path)!r}: its name is not UTF-8: rename it")
    if not paths:
        raise ValueError(f"{root}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in it")
    relative = [path.relative_to(root) for path in paths]
    items = [
        ImageItem(
            key=key,
            path=os.fspath(path),
            bytes=path.stat().st_size,
            record={"file": name.as_posix(), "class": name.parts[0]},
            label=names.index(name.parts[0]),
            origin=f"{root}",
        )
        for key, path, name in zip(_keys_of(relative), paths, relative, strict=True)
    ]
    return Source(items, classes=names)


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


def _keys_of(paths: Sequence[Path]) -> list[str]:
    """Return unique keys that look like the paths: without suffix, and without dots in the name."""
    keys = [path.with_name(path.stem.replace(".", "_")).as_posix() for path in paths]
    repeated = {key for key, count in Counter(keys).items() if count > 1}
    return [
        f"{key}_{path.suffix[1:].lower()}" if key in repeated else key
        for key, path in zip(keys, paths, strict=True)
    ]


def _json_bytes(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    if not _is_utf8(text):  # half a surrogate pair, from a careless JSON file: keep it escaped
        text = json.dumps(record, separators=(",", ":"))
    return text.encode()


def _is_utf8(text: str) -> bool:
    """Whether a text holds no surrogates, as which bytes that are not UTF-8 arrive."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
