"""COCO annotations as a list of items to pack; the other sources are in sources.py."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.plain_text import parsed_json
from tools.make_shards.checked_boxes import Box, BoxCheck, upright_size
from tools.make_shards.sources import Source, stat_items

_UNKNOWN = "category {!r} is not in categories"


def coco_source(
    images: Path, captions: Path | None, instances: Path | None, *, drop: bool = False
) -> Source:
    """Join COCO captions and instances by image id; at least one file must be given.

    The json member has `captions` if the captions file lists the image, and `boxes` (xyxy pixels),
    `labels` (index into the classes), `crowd`, `areas` and `segmentations` (polygons or run
    lengths, as in COCO) if the instances file lists it: an empty list means "none", a missing field
    "not annotated".

    Args: drop: leave bad boxes out.
    Errors: ValueError naming file and entry if the annotations are malformed; SampleFault for bad
    boxes.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: is not a folder")
    records: dict[int | str, dict[str, Any]] = {}
    classes = None
    if captions is not None:
        with _naming_entries(captions) as (content, each):
            _add_images(records, content, each, lambda: {"captions": []})
            for entry in each("annotations"):
                if not isinstance(entry["caption"], str):
                    raise ValueError(f"caption {entry['caption']!r} is not a string")
                _record_of(records, entry)["captions"].append(entry["caption"])
    boxes: dict[int | str, list[Box]] = {}
    check = BoxCheck({}, _UNKNOWN)
    if instances is not None:
        with _naming_entries(instances) as (content, each):
            categories = sorted(each("categories"), key=lambda category: category["id"])
            check.labels = {category["id"]: label for label, category in enumerate(categories)}
            classes = [str(category["name"]).strip() for category in categories]
            _add_images(records, content, each, dict)
            boxes = {image["id"]: [] for image in each("images")}
            for number, entry in enumerate(each("annotations")):
                _record_of(records, entry)
                place = f"{instances.name}, annotations[{number}]"
                boxes[entry["image_id"]].append(_box(entry, place))
    if not records:
        raise ValueError("coco needs --captions or --instances with at least one image")
    sizes = {key: _size(record) for key, record in records.items()}
    for key, of_image in boxes.items():
        size = sizes[key] or (upright_size(images / records[key]["file"]) if of_image else None)
        fields = check.fields(of_image, size)
        records[key] |= {"segmentations": [None] * len(fields["boxes"]), **fields}
    origin = Path(captions or instances or "").name
    keys = {key: f"{key:012d}" if isinstance(key, int) else key for key in records}
    order = sorted(records, key=keys.__getitem__)
    items, missing = stat_items(
        (keys[key], images / records[key]["file"], records[key], None, f"{origin}, image {key}")
        for key in order
    )
    of_keys = {keys[key]: sizes[key] for key in order}
    items = [item._replace(size=of_keys[item.key]) for item in items]
    licences = sorted({r["licence"] for r in records.values() if "licence" in r})
    details = check.finish(drop) if instances is not None else {}
    return Source(items, classes, "\n".join(licences), missing, details, rows=len(records))


def _record_of(records: dict[int | str, dict[str, Any]], entry: dict[str, Any]) -> dict[str, Any]:
    if entry["image_id"] not in records:
        raise ValueError(f"its image {entry['image_id']!r} is not in images")
    return records[entry["image_id"]]


def _add_images(
    records: dict[int | str, dict[str, Any]],
    content: dict[str, Any],
    each: Callable[[str], Iterator[dict[str, Any]]],
    empty: Callable[[], dict[str, list]],
) -> None:
    """Enter the images of one COCO file; `empty` gives the fields that its annotations fill."""
    names = {}
    for licence in content.get("licenses", []):
        names[licence["id"]] = " ".join(filter(None, (licence.get("name"), licence.get("url"))))
    for image in each("images"):
        record = {"image_id": image["id"], "file": image["file_name"]}
        for side in ("width", "height"):
            if image.get(side) is not None:
                if type(image[side]) is not int:
                    raise ValueError(f"{side} {image[side]!r} is not a whole number")
                record[side] = image[side]
        if names.get(image.get("license")):
            record["licence"] = names[image["license"]]
        source = image.get("flickr_url") or image.get("coco_url")
        if source:
            record["source"] = source
        known = records.setdefault(image["id"], record)
        if known["file"] != record["file"]:
            raise ValueError(f"id {image['id']!r} stands for {known['file']!r} already")
        known.update(empty())


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    """Take width and height out of a record: BuildImage enters those of the image."""
    size = record.pop("width", None), record.pop("height", None)
    return None if None in size else size


def _box(entry: dict[str, Any], place: str) -> Box:
    x, y, width, height = (math.nan if value is None else value for value in entry["bbox"])
    more = {"crowd": int(entry.get("iscrowd") or 0)}
    if entry.get("area") is not None:
        more["areas"] = entry["area"]
    hash(entry["category_id"])  # TypeError for what can be no category
    corners = x, y, x + width, y + height
    # [] is how files without masks say that there is none.
    return Box(corners, entry["category_id"], place, more, entry.get("segmentation") or None)


@contextlib.contextmanager
def _naming_entries(
    path: Path,
) -> Iterator[tuple[dict[str, Any], Callable[[str], Iterator[dict[str, Any]]]]]:
    """Give the content of a JSON file and a way to walk over one of its lists.

    A KeyError or the like inside the block becomes a ValueError that names file and entry.
    """
    place = ""

    def each(name: str) -> Iterator[dict[str, Any]]:
        nonlocal place
        place = ""
        if not isinstance(content.get(name), list):
            raise ValueError(f"there is no list {name!r}")
        for number, entry in enumerate(content[name]):
            place = f", {name}[{number}]"
            yield entry
        place = ""

    try:
        content = parsed_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object with images and annotations")
        yield content, each
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}{place}: malformed COCO annotations: {what}") from None
