"""Parquet tables of images, or of their paths, as a list of items. Needs pyarrow.

Images that lie in the tables are first copied, one behind the other, to a file beside the shards:
rows of a table cannot be read in the shuffled order of the shards without reading it over and over.
The file is removed when the shards are packed.
"""

import argparse
import decimal
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from data_pipeline.shards.packing import PackJob
from tools.make_shards.images import OWN_COLUMNS, ImageItem, beside_ours
from tools.make_shards.options import add_classes, add_image_source, classes_of, image_job
from tools.make_shards.sources import Source, stat_items
from tools.make_shards.walk import walk_suffix

_ROWS_AT_ONCE = 256


def add_sources(sources: Any) -> None:
    """Add `parquet` to the sub-commands of make_shards."""
    parser = add_image_source(sources, "parquet", "Parquet tables of images or paths", _job)
    parser.add_argument(
        "--table", type=Path, nargs="+", required=True, help="files, or folders of *.parquet"
    )
    parser.add_argument(
        "--image-field", default="image", help="bytes, path or a struct of both (default: image)"
    )
    parser.add_argument("--images", type=Path, help="root of relative paths; default: the table")
    parser.add_argument("--label-field", help="field with the class, as a name or a number")
    add_classes(parser)


def parquet_source(
    tables: Sequence[Path],
    *,
    image_field: str,
    spool: Path,
    root: Path | None = None,
    label_field: str | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Read tables whose `image_field` is bytes, a path, or a struct with `bytes` or `path`.

    All other fields go into the json member, but for binary ones. Rows without an image are listed
    as missing.

    Args: spool: file to which images in the tables are copied; root: what paths are relative to
    (default: the folder of the table); label_field: field with the class, a name or a number from
    0 on; classes: in label order (default: the names, sorted).
    Errors: ValueError naming table and row, or how to install pyarrow.
    """
    items: list[ImageItem] = []
    missing: list[str] = []
    read = 0

    def images() -> Iterator[bytes]:
        """Pass over the rows; yield the images that are in them."""
        nonlocal read
        begin = 0
        for count, (table, number, row) in enumerate(_rows(tables, (image_field, label_field))):
            read = count + 1
            origin = f"{table.name}, row {number}"
            data, path = _image(row.pop(image_field), origin)
            if data is None and path is None:
                missing.append(f"{origin}: no image in {image_field!r}")
                continue
            file = path or f"{table.name}:{number}"
            more = ["label"] if label_field is not None else []
            record = beside_ours({"file": file}, row, *more)
            item = ImageItem(f"{count:09d}", os.fspath(spool), 0, record, None, origin)
            if data is not None:
                items.append(item._replace(bytes=len(data), begin=begin))
                begin += len(data)
                yield data
                continue
            place = (root or table.parent) / path
            found, absent = stat_items([(item.key, place, record, None, origin)])
            items.extend(found)
            missing.extend(absent)

    spool.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(spool, images())
    if label_field is None:
        return Source(items, missing=missing, rows=read)
    labelled, names = _labelled(items, label_field, classes)
    return Source(labelled, names, missing=missing, rows=read)


def _job(options: argparse.Namespace) -> PackJob:
    files, passed_over = _files(options.table)
    state = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = sha256(repr([state, options.image_field]).encode()).hexdigest()[:16]
    # The digest keeps two packings of other tables from reading each other's images.
    spool = options.out / f".{options.split}-images-{digest}"
    source = parquet_source(
        files,
        image_field=options.image_field,
        spool=spool,
        root=options.images,
        label_field=options.label_field,
        classes=classes_of(options),
    )
    job = image_job(options, source)
    return replace(job, account={**job.account, "passed_over": passed_over}, scratch=[spool])


def _files(tables: Sequence[Path]) -> tuple[list[Path], dict[str, Any]]:
    """Return the tables, and what was passed over in folders: sub-folders may be other splits."""
    files: list[Path] = []
    passed_over: dict[str, Any] = {}
    for table in tables:
        if not table.is_dir():
            files.append(table)
            continue
        tree = walk_suffix(table, ".parquet")
        for path in tree.files:
            if len(path.parts) == 1:
                files.append(table / path)
            else:
                tree.pass_over("in a sub-folder", path)
        if tree.passed_over:
            passed_over[str(table)] = tree.account()
    if not files:
        names = ", ".join(map(str, tables))
        raise ValueError(f"{names}: no *.parquet in it; passed over: {passed_over}")
    return files, passed_over


def _rows(
    tables: Sequence[Path], needed: Sequence[str | None]
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (table, row number, fields that JSON can hold, and the image)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow") from None
    for table in tables:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(table) as file:
                names = Counter(file.schema_arrow.names)
                if repeated := [name for name, count in names.items() if count > 1]:
                    raise ValueError(f"{table}: has the fields {repeated} twice")
                absent = [n for n in needed if n is not None and n not in file.schema_arrow.names]
                if absent:
                    raise ValueError(
                        f"{table}: has no field {absent[0]!r}; it has "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        yield table, number, _plain(row, needed[0])
                        number += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ValueError(f"{table}: cannot be read behind row {number}: {error}") from None


def _plain(row: dict[str, Any], image_field: str) -> dict[str, Any]:
    """Return the fields that JSON can hold, and the image."""
    kept = {name: row[image_field] if name == image_field else _json(row[name]) for name in row}
    return {name: value for name, value in kept.items() if value is not _BINARY}


_BINARY = object()


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {name: _json(part) for name, part in value.items()}
        return {name: part for name, part in plain.items() if part is not _BINARY}
    if isinstance(value, list):
        return [part for entry in value if (part := _json(entry)) is not _BINARY]
    if isinstance(value, bytes):
        return _BINARY
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    return str(value)  # dates, times, durations


def _image(value: Any, origin: str) -> tuple[bytes | None, str | None]:
    """Return the bytes or the path of an image, from bytes, a path, or a struct of both."""
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    if isinstance(value, bytes) and value:
        return value, path
    if isinstance(value, str):
        path = value
    elif value not in (None, b""):
        raise ValueError(f"{origin}: the image is {type(value).__name__}, not bytes or a path")
    return None, path or None


def _labelled(
    items: list[ImageItem], label_field: str, classes: Sequence[str] | None
) -> tuple[list[ImageItem], list[str] | None]:
    """Return the items with labels: the numbers in `label_field`, or the places of its names."""
    values = [
        item.record[label_field]
        if label_field in item.record
        else item.record[OWN_COLUMNS][label_field]
        for item in items
    ]
    for item, value in zip(items, values, strict=True):
        if value is None or isinstance(value, bool | float | list | dict):
            raise ValueError(f"{item.origin}: {label_field!r} is {value!r}, not a name or a number")
    names = list(classes) if classes is not None else None
    numbers = all(isinstance(value, int) for value in values)
    if names is None and not numbers:
        names = sorted({str(value) for value in values})
    places = {name: label for label, name in enumerate(names or [])}
    labelled = []
    for item, value in zip(items, values, strict=True):
        label = value if numbers else places.get(str(value))
        if label is None or label < 0 or (names is not None and label >= len(names)):
            raise ValueError(f"{item.origin}: {label_field} {value!r} is not in the classes")
        labelled.append(item._replace(label=label))
    return labelled, names
