"""Frames of videos as a list of items: a folder of pictures is one sample with many images.

The frames of a sample are its members f000.jpg, f001.jpg, ... in the order of their file names.
WebDataset readers split a name at its first dot, so that `clip.f000.jpg` and `clip.f001.jpg` are
two members of the sample `clip`, and decode both by what stands behind the last dot.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.images.decode import MAX_PIXELS
from data_pipeline.plain_text import json_bytes, read_json
from data_pipeline.shards.packer import sample_bytes
from data_pipeline.shards.packing import PackJob, SampleFault
from tools.make_shards.images import ImageItem, store_image
from tools.make_shards.options import add_classes, add_image_source, classes_of, image_job
from tools.make_shards.sources import Source
from tools.make_shards.walk import walk_images
from tools.support.arguments import positive


class ClipItem(NamedTuple):
    """The frames of one clip and what goes into its json member."""

    key: str
    frames: list[ImageItem]
    record: dict[str, Any]
    label: int | None


@dataclass(frozen=True)
class BuildClip:
    """Makes the members of a ClipItem: f000.jpg and so on, json, and cls if labelled."""

    short_side: int | None = None
    """As that of BuildImage."""
    max_pixels: int = MAX_PIXELS
    """As that of BuildImage."""

    def __call__(self, item: ClipItem) -> dict[str, bytes]:
        """Return the members. Errors: SampleFault if a frame is no image, or of another size."""
        members: dict[str, bytes] = {}
        sizes: Counter[tuple[int, int]] = Counter()
        digits = max(3, len(str(len(item.frames) - 1)))
        for number, frame in enumerate(item.frames):
            image = store_image(frame, self.short_side, self.max_pixels)
            members[f"f{number:0{digits}d}.{image.extension}"] = image.data
            sizes[image.stored] += 1
            if len(sizes) > 1:
                raise SampleFault(
                    f"{frame.origin}: {frame.path} has {image.size[0]} x {image.size[1]} pixels, "
                    "unlike the frames before it: not the same video"
                )
        (width, height), _ = sizes.most_common(1)[0]
        record = {**item.record, "frames": len(item.frames), "width": width, "height": height}
        if item.label is None:
            return members | {"json": json_bytes(record)}
        record["label"] = item.label
        return members | {"json": json_bytes(record), "cls": str(item.label).encode()}


def add_sources(sources: Any) -> None:
    """Add `frames` to the sub-commands of make_shards."""
    parser = add_image_source(sources, "frames", "folders of video frames, a sample each", _job)
    parser.add_argument("--images", type=Path, required=True, help="folder with the clips")
    parser.add_argument(
        "--class-folders", action="store_true", help="clips lie in folders that name their class"
    )
    parser.add_argument("--every", type=positive, default=1, help="keep each N-th frame")
    parser.add_argument("--max-frames", type=positive, help="spread evenly over the clip")
    parser.add_argument("--fps", type=float, help="frames per second of the folders, for the json")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help='JSON: {"folder of a clip, below --images": ["caption", ...]}, for all clips',
    )
    add_classes(parser)


def frames_source(
    root: Path,
    *,
    class_folders: bool = False,
    classes: list[str] | None = None,
    every: int = 1,
    max_frames: int | None = None,
    fps: float | None = None,
    captions: Mapping[str, list[str]] | None = None,
) -> Source:
    """List the folders that hold images, at any depth; each is a clip.

    Frames are ordered by the numbers in their names (9 before 10), then by name.

    Args: class_folders: the first folder below `root` names the class; classes: in label order
    (default: sorted); every, max_frames: which frames are kept; fps: of the folder, before that;
    captions: folder of a clip, below `root` -> its captions.
    Errors: ValueError if there is no clip, or one whose class `classes` lacks, or which `captions`
    lacks; or if there is no clip of some captions.
    """
    clips, passed_over = _clips(root)
    if not clips:
        raise ValueError(f"{root}: no folder with images in it")
    names = classes
    if class_folders and names is None:
        names = sorted({path.parts[0] for path, _ in clips})
    if captions is not None:
        _check_captions(captions, [path.as_posix() for path, _ in clips], root)
    items = []
    for path, files in clips:
        if class_folders and (len(path.parts) < 2 or path.parts[0] not in names):
            raise ValueError(
                f"{root / path}: clips lie in CLASS/CLIP/"
                if len(path.parts) < 2
                else f"{root / path}: {path.parts[0]!r} is not in the list of classes"
            )
        chosen = _spread(files[::every], max_frames)
        origin = path.as_posix()
        frames = [
            ImageItem("", os.path.join(root, path, name), size, {}, None, origin)
            for name, size in chosen
        ]
        record: dict[str, Any] = {"file": origin, "frames_before": len(files)}
        if fps is not None:
            record["fps"] = fps * len(chosen) / len(files)
        if captions is not None:
            record["captions"] = captions[origin]
        if class_folders:
            record["class"] = path.parts[0]
        label = names.index(path.parts[0]) if class_folders else None
        items.append(ClipItem(origin, frames, record, label))
    account = {"passed_over": passed_over}
    names = names if class_folders else None
    return Source(items, classes=names, account=account, rows=len(clips))


def _job(options: argparse.Namespace) -> PackJob:
    source = frames_source(
        options.images,
        class_folders=options.class_folders,
        classes=classes_of(options),
        every=options.every,
        max_frames=options.max_frames,
        fps=options.fps,
        captions=options.captions and read_captions(options.captions),
    )
    return image_job(
        options,
        source,
        BuildClip(options.short_side, options.max_pixels or MAX_PIXELS),
        _clip_bytes,
    )


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by clip, from a JSON file. Errors: OSError; ValueError names what is wrong in it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object of clips and their captions")
    for clip, texts in found.items():
        whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if not whole or not texts:
            raise ValueError(f"{path}: {clip!r} has no list of captions, but {str(texts)[:80]}")
    return found


def _check_captions(captions: Mapping[str, Any], clips: list[str], root: Path) -> None:
    for what, names in (
        ("have no captions", sorted(set(clips) - captions.keys())),
        ("have captions, but no folder with images", sorted(captions.keys() - set(clips))),
    ):
        if names:
            few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{root}: {len(names)} clips {what}: {few}")


def _clip_bytes(item: ClipItem, bundle: int) -> int:
    sizes = {f"f{number:06d}.jpeg": frame.bytes for number, frame in enumerate(item.frames)}
    record = len(json_bytes(item.record)) + 128
    return sample_bytes(item.key, sizes | {"json": record, "cls": 8}, bundle)


def _clips(
    root: Path,
) -> tuple[list[tuple[Path, list[tuple[str, int]]]], dict[str, dict[str, int]]]:
    """Return (folder below the root, its images as (name, bytes) in order) of all clips, sorted,
    and how many files were passed over."""
    tree = walk_images(root)
    clips: dict[Path, list[str]] = {}
    for path in tree.files:
        if len(path.parts) == 1:
            tree.pass_over("in no clip's folder", path)
        else:
            clips.setdefault(path.parent, []).append(path.name)
    sized = [
        (folder, [(n, os.path.getsize(root / folder / n)) for n in sorted(names, key=_in_time)])
        for folder, names in sorted(clips.items())
    ]
    return sized, tree.account()


def _in_time(name: str) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"[0-9]+", name)], name


def _spread(files: list[tuple[str, int]], count: int | None) -> list[tuple[str, int]]:
    """Return `count` files from the middles of as many equal parts of the list."""
    if count is None or count >= len(files):
        return files
    return [files[(2 * place + 1) * len(files) // (2 * count)] for place in range(count)]
