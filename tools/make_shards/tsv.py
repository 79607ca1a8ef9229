"""GIT's TSV files as a list of items: images as base64 text, captions as JSON lists, joined by key.

An image file has a key and base64 text in each line, a caption file a key and a JSON list of texts
or of objects with `caption`. Files `NAME.lineidx` or `NAME.lineidx.8b` beside them hold the byte at
which each line begins; they are not needed, but an old one is noticed.
"""

import argparse
import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.plain_text import parsed_json, read_text
from data_pipeline.shards.packing import PackJob
from tools.make_shards.images import ImageItem
from tools.make_shards.options import add_image_source, image_job
from tools.make_shards.sources import Source


class _Line(NamedTuple):
    """One line of a TSV file: where it begins in the file, and its columns."""

    number: int
    begin: int
    columns: list[bytes]


def add_sources(sources: Any) -> None:
    """Add `tsv` to the sub-commands of make_shards."""
    parser = add_image_source(sources, "tsv", "TSV files of base64 images and captions", _job)
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, help="TSV files: key, ..., base64 image"
    )
    parser.add_argument("--captions", type=Path, nargs="+", help="TSV files: key, JSON list")
    parser.add_argument(
        "--image-column", type=int, default=2, help="of the image, from 1 on (default %(default)s)"
    )


def tsv_source(images: list[Path], captions: list[Path], image_column: int = 2) -> Source:
    """Join TSV files of images and captions by key.

    The json member has `captions` and, where the list holds objects with more than a caption,
    `annotations`: the list as it is. Lines without a partner are listed as missing.

    Args: captions: may be empty: images alone.
    Errors: ValueError naming file and line for malformed lines, keys that are there twice, and
    index files that do not fit.
    """
    if image_column < 2:
        raise ValueError(f"--image-column {image_column}: the first column is the key")
    texts = _captions(captions)
    items: dict[str, ImageItem] = {}
    missing = []
    for path in images:
        for line in _lines(path):
            where = f"{path.name}, line {line.number}"
            key = _key(line, where)
            if len(line.columns) < image_column:
                raise ValueError(f"{path}, line {line.number}: has no column {image_column}")
            if key in items:
                raise ValueError(f"{where}: key {key!r} is there already: {items[key].origin}")
            if captions and key not in texts:
                missing.append(f"{where}: key {key!r} has no captions")
                continue
            before = line.columns[: image_column - 1]
            fields = texts.pop(key)[1] if captions else {}
            record = {"file": f"{path.name}:{line.number}", "key": key, **fields}
            items[key] = ImageItem(
                key=key.strip("/"),
                path=str(path),
                bytes=len(line.columns[image_column - 1]),
                record=record,
                label=None,
                origin=f"{where}, key {key!r}",
                begin=line.begin + sum(len(column) + 1 for column in before),
                base64=True,
            )
    count = len(items) + len(missing) + len(texts)
    missing += [f"{where}: key {key!r} has no image" for key, (where, _) in texts.items()]
    return Source(list(items.values()), missing=missing, rows=count)


def _job(options: argparse.Namespace) -> PackJob:
    source = tsv_source(options.images, options.captions or [], options.image_column)
    return image_job(options, source)


def _captions(paths: list[Path]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return key -> (where it stands, fields for the json member)."""
    texts: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in paths:
        for line in _lines(path):
            where = f"{path.name}, line {line.number}"
            key = _key(line, where)
            if key in texts:
                raise ValueError(f"{where}: key {key!r} is there already: {texts[key][0]}")
            try:
                texts[key] = where, _fields(parsed_json(line.columns[1]))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{where}: not a JSON list of captions: {error}") from None
    return texts


def _fields(content: Any) -> dict[str, Any]:
    if not isinstance(content, list):
        raise ValueError(f"it is {type(content).__name__}")
    if all(isinstance(entry, str) for entry in content):
        return {"captions": content}
    if not all(isinstance(entry, dict) for entry in content):
        raise ValueError("it mixes texts, objects or others")
    captions = [entry["caption"] for entry in content if isinstance(entry.get("caption"), str)]
    if all(entry.keys() == {"caption"} for entry in content):
        return {"captions": captions}
    return {"captions": captions, "annotations": content}


def _key(line: _Line, where: str) -> str:
    try:
        key = line.columns[0].decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where}: its key is not UTF-8") from None
    if not key:
        raise ValueError(f"{where}: has no key")
    return key


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a TSV file; compare them with the index beside it, if there is one."""
    begins = _line_index(path)
    begin = count = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if begins is not None and (number > len(begins) or begins[number - 1] != begin):
                raise ValueError(
                    f"{path}.lineidx: does not fit line {number} of the file, which begins at byte "
                    f"{begin}: it is of another version; remove it or make it anew"
                )
            # A byte order mark is no part of the first key.
            mark = len(codecs.BOM_UTF8) * (number == 1 and line.startswith(codecs.BOM_UTF8))
            if line.strip(b"\r\n"):
                yield _Line(number, begin + mark, line[mark:].rstrip(b"\r\n").split(b"\t"))
            begin += len(line)
            count = number
    if begins is not None and len(begins) != count:
        raise ValueError(
            f"{path}: has {count} lines, and its .lineidx has {len(begins)}: the file is cut, or "
            "the index is of another version"
        )


def _line_index(path: Path) -> list[int] | None:
    """Read NAME.lineidx (a number per line) or NAME.lineidx.8b (64-bit little-endian numbers).

    NAME is that of the file, or, as GIT writes it, that without its suffix.
    """
    for name in (f"{path}.lineidx", f"{path.with_suffix('')}.lineidx"):
        if (binary := Path(f"{name}.8b")).exists():
            data = binary.read_bytes()
            if len(data) % 8:
                raise ValueError(f"{binary}: has {len(data)} bytes, not 8 for each line")
            return np.frombuffer(data, "<i8").tolist()
        if (place := Path(name)).exists():
            try:
                return [int(line) for line in read_text(place).split()]
            except ValueError as error:
                raise ValueError(f"{place}: is not a list of numbers: {error}") from None
    return None
