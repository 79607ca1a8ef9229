"""Pascal VOC and YOLO annotations as lists of items, with the fields that COCO's have."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml
from PIL import Image

from data_pipeline.packing import PackJob, SampleFault
from tools.pack_images import IMAGE_SUFFIXES, ImageItem
from tools.pack_options import add_classes, add_image_source, classes_of, image_job
from tools.pack_options import refuse_shrinking as refuse
from tools.pack_sources import Source, keys_of

_FAULTS_SHOWN = 5
# Rounding of relative coordinates and different ideas of where pixels begin; moved to the border.
_TOLERANCE_PIXELS = 1.0
_ORIENTATION_TAG = 0x0112


class Box(NamedTuple):
    """One object; `corners` are x0, y0, x1, y1 in pixels, x1 and y1 behind the last one."""

    corners: tuple[float, float, float, float]
    name: str
    where: str
    flags: dict[str, int]
    polygon: list[float] | None = None


def add_sources(sources: Any) -> None:
    """Add `voc` and `yolo` to the sub-commands of make_shards."""
    voc = add_image_source(sources, "voc", "images with Pascal VOC annotations", _voc_job)
    voc.add_argument("--images", type=Path, required=True, help="folder, e.g. JPEGImages")
    voc.add_argument("--annotations", type=Path, required=True, help="folder of XML files")
    voc.add_argument("--list", type=Path, help="text file: names of the images that take part")
    voc.add_argument(
        "--first-pixel", type=int, choices=(0, 1), default=1, help="its number (default: 1, as VOC)"
    )
    add_classes(voc)
    yolo = add_image_source(sources, "yolo", "images with YOLO label files", _yolo_job)
    yolo.add_argument("--images", type=Path, required=True, help="folder, e.g. images/train")
    yolo.add_argument("--labels", type=Path, required=True, help="folder, e.g. labels/train")
    yolo.add_argument(
        "--classes", type=Path, required=True, help="names in label order: text, or data.yaml"
    )
    for parser in (voc, yolo):
        parser.add_argument(
            "--on-bad-box",
            choices=("error", "drop"),
            default="error",
            help="boxes outside of the image, empty, or of an unknown class (default %(default)s)",
        )


def voc_source(
    images: Path,
    annotations: Path,
    *,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    first_pixel: int = 1,
    drop: bool = False,
) -> Source:
    """Read Pascal VOC annotations: one XML file per image.

    The json member has `boxes`, `labels`, `areas`, `crowd` (0) and the flags `difficult` and
    `truncated`, a number per box.

    Args: names: images that take part (default: all annotations); classes: in label order
    (default: sorted); first_pixel: number of the first pixel; drop: leave bad boxes out.
    Errors: ValueError naming file and box if an annotation is malformed; SampleFault for bad boxes.
    """
    if not annotations.is_dir():
        raise ValueError(f"{annotations}: is not a folder")
    paths = sorted(annotations.glob("*.xml"))
    if names is not None:
        paths = [annotations / f"{name}.xml" for name in names]
    parsed = [_voc_file(path, first_pixel) for path in paths]
    if classes is None:
        classes = sorted({box.name for _, _, boxes in parsed for box in boxes})
    described = (
        (path.stem, images / name, path.name, size, boxes)
        for path, (name, size, boxes) in zip(paths, parsed, strict=True)
    )
    return _source(described, classes, drop)


def yolo_source(
    images: Path, labels: Path, classes: Sequence[str], *, drop: bool = False
) -> Source:
    """Read YOLO labels: a text file per image with `class x y width height`, or a polygon, a line.

    An image without a label file has no objects, as YOLO has it.

    Errors: ValueError naming file and line if a label is malformed; SampleFault for bad boxes.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder")
    paths = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    )
    if not paths:
        raise ValueError(f"{images}: no image in it")
    relative = [path.relative_to(images) for path in paths]
    unlabelled = sum(not (labels / name).with_suffix(".txt").exists() for name in relative)
    if unlabelled == len(paths):
        raise ValueError(f"{labels}: has a label file for none of the {len(paths)} images")

    def described() -> Iterator[tuple[str, Path, str, tuple[int, int] | None, list[Box]]]:
        for key, path, name in zip(keys_of(relative), paths, relative, strict=True):
            label = (labels / name).with_suffix(".txt")
            lines = label.read_text(encoding="utf-8").splitlines() if label.exists() else []
            size = _upright_size(path)
            where = f"{name.with_suffix('.txt').as_posix()}"
            boxes = [
                _yolo_box(line.split(), size or (1, 1), classes, f"{where}, line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
            yield key, path, where, size, boxes

    source = _source(described(), classes, drop)
    return replace(source, details={**source.details, "without_label_file": unlabelled})


def _voc_job(options: argparse.Namespace) -> PackJob:
    refuse(options, "voc")
    names = None
    if options.list is not None:
        lines = options.list.read_text(encoding="utf-8").splitlines()
        names = [_listed(line.strip(), options.annotations) for line in lines if line.strip()]
    source = voc_source(
        options.images,
        options.annotations,
        names=names,
        classes=classes_of(options),
        first_pixel=options.first_pixel,
        drop=options.on_bad_box == "drop",
    )
    return image_job(options, source)


def _listed(line: str, annotations: Path) -> str:
    """Return the name in a line of a list; those of single classes have a second column."""
    if (annotations / f"{line}.xml").exists():
        return line
    name = line.rsplit(maxsplit=1)[0]
    if not (annotations / f"{name}.xml").exists():
        raise ValueError(f"--list names {line!r}, and {annotations} has no {line}.xml")
    return name


def _yolo_job(options: argparse.Namespace) -> PackJob:
    refuse(options, "yolo")
    classes = classes_of(options)
    if options.classes.suffix in (".yaml", ".yml"):
        classes = _yaml_names(options.classes)
    drop = options.on_bad_box == "drop"
    return image_job(options, yolo_source(options.images, options.labels, classes, drop=drop))


def _source(
    described: Iterable[tuple[str, Path, str, tuple[int, int] | None, list[Box]]],
    classes: Sequence[str],
    drop: bool,
) -> Source:
    """Return the items of (key, image, origin, (width, height), boxes), their boxes checked."""
    labels = {name: label for label, name in enumerate(classes)}
    items, missing, bad, count = [], [], [], 0
    for key, path, origin, size, boxes in described:
        try:
            total = path.stat().st_size
        except OSError as error:
            missing.append(f"{origin}: {path}: {error.strerror}")
            continue
        record: dict[str, Any] = {"file": path.name}
        if size is not None:
            record |= {"width": size[0], "height": size[1]}
        faults = [_fault(box, size, labels) for box in boxes]
        bad += [fault for fault in faults if fault]
        count += len(boxes)
        kept = [box for box, fault in zip(boxes, faults, strict=True) if fault is None]
        record |= _fields(kept, size, labels)
        items.append(ImageItem(key, os.fspath(path), total, record, None, origin))
    if bad and not drop:
        shown = "\n  ".join(bad[:_FAULTS_SHOWN])
        more = f"\n  and {len(bad) - _FAULTS_SHOWN} more" if len(bad) > _FAULTS_SHOWN else ""
        raise SampleFault(
            f"{len(bad)} of {count} boxes are bad:\n  {shown}{more}\n(--on-bad-box drop leaves "
            "them out)"
        )
    return Source(items, list(classes), missing=missing, details={"dropped_boxes": len(bad)})


def _fault(box: Box, size: tuple[int, int] | None, labels: dict[str, int]) -> str | None:
    """Say what is wrong with a box."""
    x0, y0, x1, y1 = box.corners
    if box.name not in labels:
        return f"{box.where}: class {box.name!r} is not in the classes"
    if not (x0 < x1 and y0 < y1):
        return f"{box.where}: box {x0:g}, {y0:g}, {x1:g}, {y1:g} is empty"
    if size is None:
        return None  # the image cannot be read, which is found when it is packed
    if max(-x0, -y0, x1 - size[0], y1 - size[1]) > _TOLERANCE_PIXELS:
        return (
            f"{box.where}: box {x0:g}, {y0:g}, {x1:g}, {y1:g} is outside of the image of "
            f"{size[0]} x {size[1]} pixels"
        )
    return None


def _fields(
    boxes: list[Box], size: tuple[int, int] | None, labels: dict[str, int]
) -> dict[str, list]:
    width, height = size or (0, 0)
    corners = [
        [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
        for x0, y0, x1, y1 in (box.corners for box in boxes)
    ]
    fields: dict[str, list] = {
        "boxes": corners,
        "labels": [labels[box.name] for box in boxes],
        "crowd": [0] * len(boxes),
        "areas": [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners],
    }
    if any(box.polygon for box in boxes):
        fields["segmentations"] = [box.polygon and [box.polygon] for box in boxes]
    for flag in sorted({flag for box in boxes for flag in box.flags}):
        fields[flag] = [box.flags.get(flag, 0) for box in boxes]
    return fields


def _voc_file(path: Path, first_pixel: int) -> tuple[str, tuple[int, int], list[Box]]:
    """Return the name of the image, its width and height, and the boxes of a VOC annotation."""
    where = path.name
    try:
        root = ElementTree.parse(path).getroot()
        name = _text(root, "filename")
        size = int(_text(root, "size/width")), int(_text(root, "size/height"))
        boxes = []
        for number, entry in enumerate(root.findall("object"), 1):
            where = f"{path.name}, object {number}"
            x0, y0, x1, y1 = (
                float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            # The first and last pixel are inside: the box ends behind the last one.
            corners = x0 - first_pixel, y0 - first_pixel, x1 - first_pixel + 1, y1 - first_pixel + 1
            flags = {n: int(entry.findtext(n) or 0) for n in ("difficult", "truncated")}
            boxes.append(Box(corners, _text(entry, "name"), where, flags))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path.parent / where}: malformed VOC annotation: {error}") from None
    return name, size, boxes


def _text(entry: ElementTree.Element, path: str) -> str:
    text = (entry.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"no {path}")
    return text


def _yolo_box(
    words: list[str], size: tuple[int, int], classes: Sequence[str], where: str
) -> Box:
    try:
        number, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError as error:
        raise ValueError(f"{where}: malformed YOLO label: {error}") from None
    width, height = size
    name = classes[number] if 0 <= number < len(classes) else f"number {number}"
    if len(values) == 4:
        x, y, half_w, half_h = values[0], values[1], values[2] / 2, values[3] / 2
        x0, x1, y0, y1 = x - half_w, x + half_w, y - half_h, y + half_h
        return Box(_rounded((x0 * width, y0 * height, x1 * width, y1 * height)), name, where, {})
    if len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{where}: malformed YOLO label: {len(values)} numbers behind the class; a box has 4, "
            "a polygon 6 or more"
        )
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    polygon = [round(value, 2) for point in zip(xs, ys, strict=True) for value in point]
    return Box(_rounded((min(xs), min(ys), max(xs), max(ys))), name, where, {}, polygon)


def _rounded(corners: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Relative coordinates have six digits: more digits of a pixel are noise."""
    x0, y0, x1, y1 = (round(value, 3) for value in corners)
    return x0, y0, x1, y1


def _upright_size(path: Path) -> tuple[int, int] | None:
    """Return width and height as a viewer shows the image; None if it is none."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION_TAG, 1) >= 5
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _yaml_names(path: Path) -> list[str]:
    """Return the class names of a data.yaml: a list, or number -> name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: has no list `names` of classes, numbered from 0 on")
    return [str(name) for name in names]
