"""Pascal VOC and YOLO annotations as lists of items, with the fields that COCO's have."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

from data_pipeline.plain_text import read_names, read_text
from data_pipeline.shards.packing import PackJob
from tools.make_shards.checked_boxes import Box, BoxCheck, add_on_bad_box, upright_size
from tools.make_shards.images import ImageItem
from tools.make_shards.options import add_classes, add_image_source, classes_of, image_job
from tools.make_shards.options import refuse_shrinking as refuse
from tools.make_shards.sources import Source, keys_of
from tools.make_shards.walk import walk_images, walk_suffix

_NAMES_SHOWN = 5


class Described(NamedTuple):
    """An image and what its annotation says."""

    key: str
    path: Path
    origin: str
    size: tuple[int, int] | None
    """Width and height that the boxes are for."""
    boxes: list[Box]


class YoloForm(NamedTuple):
    """What stands in a line of a YOLO label behind the class, beside a box of four numbers."""

    key_points: tuple[int, int] | None = None
    """How many key points, and numbers for each (2: x, y; 3: and whether it is seen)."""
    polygons: bool = False
    """Whether six and more numbers are the corners of a polygon."""


_BOXES_ONLY = YoloForm()
_UNKNOWN = "class {!r} is not in the classes"


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
    yolo.add_argument(
        "--segments",
        action="store_true",
        help="lines of six and more numbers are polygons (or `task: segment` in data.yaml)",
    )
    for parser in (voc, yolo):
        add_on_bad_box(parser)


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
    tree = walk_suffix(annotations, ".xml")
    paths = tree.files
    if names is not None:
        paths = [Path(f"{name}.xml") for name in names]
    parsed = [_voc_file(annotations / path, first_pixel) for path in paths]
    if classes is None:
        classes = sorted({box.name for _, _, boxes in parsed for box in boxes})
    described = (
        Described(
            path.with_suffix("").as_posix(),
            _voc_image(images, path.parent, name),
            path.as_posix(),
            size,
            boxes,
        )
        for path, (name, size, boxes) in zip(paths, parsed, strict=True)
    )
    return _source(described, classes, drop, {"passed_over": tree.account()})


def _voc_image(images: Path, folder: Path, name: str) -> Path:
    """Return the image of an annotation, which may lie in a folder of the same name as it."""
    beside = images / folder / name
    return beside if beside.exists() else images / name


def yolo_source(
    images: Path,
    labels: Path,
    classes: Sequence[str],
    *,
    drop: bool = False,
    form: YoloForm = _BOXES_ONLY,
) -> Source:
    """Read YOLO labels: a text file per image with `class x y width height` a line.

    What else a line may hold, `form` says; nothing is guessed from the count of its numbers. An
    image without a label file has no objects, as YOLO has it.

    Errors: ValueError naming file and line if a label is malformed; SampleFault for bad boxes.
    """
    tree, label_tree = walk_images(images), walk_suffix(labels, ".txt")
    names = tree.files
    if not names:
        raise ValueError(f"{images}: no image in it")
    wanted = {name.with_suffix(".txt") for name in names}
    unlabelled = sum(not (labels / name.with_suffix(".txt")).exists() for name in names)
    if unlabelled == len(names):
        raise ValueError(f"{labels}: has a label file for none of the {len(names)} images")
    alone = [path.as_posix() for path in label_tree.files if path not in wanted]

    def described() -> Iterator[Described]:
        for key, name in zip(keys_of(names), names, strict=True):
            label = name.with_suffix(".txt")
            text = read_text(labels / label) if (labels / label).exists() else ""
            size = upright_size(images / name)
            where = f"{label.as_posix()}, line"
            boxes = [
                _yolo_box(line.split(), size or (1, 1), classes, f"{where} {number}", form)
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
            yield Described(key, images / name, label.as_posix(), size, boxes)

    account: dict[str, Any] = {"passed_over": tree.account()}
    if alone:
        account["labels_without_image"] = {"files": len(alone), "first": alone[:_NAMES_SHOWN]}
    return _source(described(), classes, drop, account, without_label_file=unlabelled)


def _voc_job(options: argparse.Namespace) -> PackJob:
    refuse(options, "voc")
    names = None
    if options.list is not None:
        lines = read_text(options.list).split("\n")
        names = [_listed(line.strip(), options.annotations) for line in lines if line.strip()]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{options.list}: names {repeated[:_NAMES_SHOWN]} twice")
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
    classes, form = _yolo_classes(options.classes, options.segments)
    drop = options.on_bad_box == "drop"
    source = yolo_source(options.images, options.labels, classes, drop=drop, form=form)
    return image_job(options, source)


def _source(
    described: Iterable[Described],
    classes: Sequence[str],
    drop: bool,
    account: dict[str, Any],
    **details: int,
) -> Source:
    """Return the items of annotated images, their boxes checked."""
    check = BoxCheck(
        {name: label for label, name in enumerate(classes)},
        _UNKNOWN,
        {"difficult": 0, "truncated": 0},
    )
    items, missing, read = [], [], 0
    for key, path, origin, size, boxes in described:
        read += 1
        try:
            total = path.stat().st_size
        except OSError as error:
            missing.append(f"{origin}: {path}: {error.strerror}")
            continue
        record = {"file": path.name, **check.fields(boxes, size)}
        items.append(ImageItem(key, os.fspath(path), total, record, None, origin, size=size))
    details = {**check.finish(drop), **details}
    return Source(items, list(classes), "", missing, details, account, read)


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
    words: list[str], size: tuple[int, int], classes: Sequence[str], where: str, form: YoloForm
) -> Box:
    try:
        number, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError as error:
        raise ValueError(f"{where}: malformed YOLO label: {error}") from None
    name = classes[number] if 0 <= number < len(classes) else f"number {number}"
    points, numbers = form.key_points or (0, 0)
    if form.polygons and len(values) >= 6 and len(values) % 2 == 0:
        polygon = _in_pixels(values, 2, size)
        xs, ys = polygon[::2], polygon[1::2]
        return Box((min(xs), min(ys), max(xs), max(ys)), name, where, {}, [polygon])
    if len(values) != 4 and len(values) != 4 + points * numbers:
        raise ValueError(f"{where}: malformed YOLO label: {_expected(len(values), form)}")
    x, y, half_w, half_h = values[0], values[1], values[2] / 2, values[3] / 2
    x0, y0, x1, y1 = _in_pixels([x - half_w, y - half_h, x + half_w, y + half_h], 2, size)
    more = {}
    if len(values) > 4:
        flat = _in_pixels(values[4:], numbers, size)
        more = {"key_points": [flat[i : i + numbers] for i in range(0, len(flat), numbers)]}
    return Box((x0, y0, x1, y1), name, where, more)


def _expected(count: int, form: YoloForm) -> str:
    text = f"{count} numbers behind the class; a box has 4"
    if form.key_points is not None:
        points, numbers = form.key_points
        return f"{text}, and {4 + points * numbers} with the key points of kpt_shape"
    if form.polygons:
        return f"{text}, a polygon an even number from 6 on"
    return (
        f"{text}. If these are polygons, say --segments; key points need kpt_shape in data.yaml; "
        "confidences and track numbers are no labels: remove them"
    )


def _in_pixels(values: Sequence[float], numbers: int, size: tuple[int, int]) -> list[float]:
    """Return relative coordinates in pixels; of each `numbers` values the first two are x and y.

    They have six digits: more digits of a pixel are noise.
    """
    scales = [*size, *[1] * (numbers - 2)]
    return [round(value * scales[i % numbers], 3) for i, value in enumerate(values)]


def _yolo_classes(path: Path, segments: bool) -> tuple[list[str], YoloForm]:
    """Return the names of a text file or of a data.yaml, and what the latter says of labels."""
    if path.suffix not in (".yaml", ".yml"):
        return read_names(path), YoloForm(polygons=segments)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {error}") from None
    content = content if isinstance(content, dict) else {}
    names = content.get("names")
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: has no list `names` of classes, numbered from 0 on")
    names = [str(name).strip() for name in names]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: has the classes {repeated} twice")
    segments = segments or content.get("task") == "segment"
    shape = content.get("kpt_shape")
    if shape is None:
        return names, YoloForm(polygons=segments)
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not whole or shape[0] < 1 or shape[1] not in (2, 3):
        raise ValueError(f"{path}: kpt_shape {shape!r} is not [key points, 2 or 3 numbers each]")
    if segments:
        raise ValueError(f"{path}: has kpt_shape, and labels are either key points or polygons")
    return names, YoloForm((shape[0], shape[1]))
