"""COCO annotations as a list of items to pack; the other sources are in pack_sources.py."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.pack_sources import Source, stat_items

_BOX_FIELDS = ("boxes", "labels", "crowd", "areas", "segmentations")


def coco_source(images: Path, captions: Path | None, instances: Path | None) -> Source:
    """Join COCO captions and instances by image id; at least one file must be given.

    The json member has `captions` if the captions file lists the image, and `boxes` (xyxy pixels),
    `labels` (index into the classes), `crowd`, `areas` and `segmentations` (polygons or run
    lengths, as in COCO) if the instances file lists it: an empty list means "none", a missing field
    "not annotated".

    Errors: ValueError naming file and entry if the annotations are malformed.
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
    if instances is not None:
        with _naming_entries(instances) as (content, each):
            categories = sorted(each("categories"), key=lambda category: category["id"])
            labels = {category["id"]: label for label, category in enumerate(categories)}
            classes = [str(category["name"]) for category in categories]
            _add_images(records, content, each, lambda: {name: [] for name in _BOX_FIELDS})
            for entry in each("annotations"):
                _add_box(_record_of(records, entry), entry, labels)
    if not records:
        raise ValueError("coco needs --captions or --instances with at least one image")
    origin = Path(captions or instances or "").name
    keys = {key: f"{key:012d}" if isinstance(key, int) else key for key in records}
    items, missing = stat_items(
        (keys[key], images / records[key]["file"], records[key], None, f"{origin}, image {key}")
        for key in sorted(records, key=keys.__getitem__)
    )
    licences = sorted({r["licence"] for r in records.values() if "licence" in r})
    return Source(items, classes, "\n".join(licences), missing)


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
        record |= {side: image[side] for side in ("width", "height") if side in image}
        if names.get(image.get("license")):
            record["licence"] = names[image["license"]]
        source = image.get("flickr_url") or image.get("coco_url")
        if source:
            record["source"] = source
        known = records.setdefault(image["id"], record)
        if known["file"] != record["file"]:
            raise ValueError(f"id {image['id']!r} stands for {known['file']!r} already")
        known.update(empty())


def _add_box(record: dict[str, Any], entry: dict[str, Any], labels: dict[int, int]) -> None:
    x, y, width, height = entry["bbox"]
    record["boxes"].append([x, y, x + width, y + height])
    record["labels"].append(labels[entry["category_id"]])
    record["crowd"].append(int(entry.get("iscrowd", 0)))
    record["areas"].append(entry.get("area", width * height))
    record["segmentations"].append(entry.get("segmentation"))


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
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object with images and annotations")
        yield content, each
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}{place}: malformed COCO annotations: {what}") from None
