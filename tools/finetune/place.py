"""PLACE: shards, a folder per class, or a COCO JSON beside images; and which rows are learned."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.filters.selection import Selection
from data_pipeline.loader.loader import TaskStream
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.rng import keyed_u64
from data_pipeline.samples.sample_processor import SampleProcessor
from data_pipeline.shards.shard_set import ShardSet

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def as_shards(place: str, packed: Path, leads: bool, wait: Any, images: str | None) -> list[str]:
    """Shards of a place; what is none is packed into `packed` by the process that leads.

    Raises ValueError: nothing that has images.
    """
    path, words = Path(place), None
    if path.is_dir() and not any(path.glob("*.tar")):
        folders = [one for one in path.iterdir() if one.is_dir()]
        if not any(file.suffix.lower() in _SUFFIXES for one in folders for file in one.iterdir()):
            raise ValueError(
                f"{place}: neither shards (*.tar) nor a folder of images for each class; it has "
                f"{', '.join(sorted(one.name for one in path.iterdir())[:5]) or 'nothing'}. Other "
                "kinds of data: `python -m tools.make_shards --help` packs them"
            )
        words = ["folder", "--images", place]
    elif path.suffix == ".json":
        annotations = _coco(path)
        if not annotations or "caption" not in annotations[0]:
            raise ValueError(f"{place}: no COCO captions; boxes are no classes of images")
        words = ["coco", "--captions", place, "--images", images or str(path.parent)]
    if words is None:
        return [place]
    from tools.make_shards.__main__ import main

    if leads and main([*words, "--out", str(packed.parent), "--split", packed.name]):
        raise ValueError(f"{place} could not be packed: see above")
    wait()
    return [str(packed)]


def _coco(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a COCO JSON: {type(error).__name__}: {error}") from None


def labels_of(shards: ShardSet, source: str) -> np.ndarray:
    """(N,) int64 class of each row, -1 where it has none. Raises ValueError: no row has one."""
    try:
        column = shards.column(source.removeprefix("json:"))
    except KeyError as error:
        raise ValueError(
            f"no class numbers at {source}: {error.args[0]}; see --label-source"
        ) from None
    found = np.where(np.isnan(column), -1, column).astype(np.int64)
    if not (found >= 0).any():
        raise ValueError(f"no sample has a class number at {source}")
    return found


@dataclass(frozen=True)
class Rows:
    """Which rows of a data set are learned and which are judged: (N,) bool each."""

    train: np.ndarray
    test: np.ndarray


def split_rows(labels: np.ndarray, holdout: float, per_class: int | None, seed: int) -> Rows:
    """Hold out a share of each class, and learn from the rest, or from so many of each class.

    labels: (N,) int64, -1 for rows that take no part. The rows of a smaller `per_class` are among
    those of a larger one, and what is held out depends on neither.

    Raises ValueError: a class has fewer samples than asked for.
    """
    train, test = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        rng = np.random.default_rng(keyed_u64(seed, "finetune rows", int(label)))
        rows = rows[rng.permutation(len(rows))]
        kept = round(len(rows) * holdout) or int(holdout > 0 and len(rows) > 1)
        test[rows[:kept]] = True
        rest = rows[kept:]
        if per_class is not None and len(rest) < per_class:
            raise ValueError(
                f"--per-class {per_class}: class {label} has {len(rest)} samples to learn from"
                + (f" beside {kept} held-out ones" if kept else "")
            )
        train[rest[:per_class]] = True
    return Rows(train, test)


def training_stream(
    shards: ShardSet, rows: np.ndarray, fields: SampleProcessor, seed: int, batch: int, micro: int
) -> TaskStream:
    """The rows in random order, without end."""
    chosen = Selection.gather(len(rows), [rows])
    order = KeptOrder(Order.plan(chosen.n_kept, keyed_u64(seed, "finetune") >> 1, batch), chosen)
    return TaskStream("finetune", SampleReader(shards), order, fields, seed, batch, micro)


def test_stream(
    shards: ShardSet, rows: np.ndarray, fields: SampleProcessor, batch: int
) -> TaskStream:
    """The rows, once each."""
    chosen = Selection.gather(len(rows), [rows])
    return TaskStream("test", SampleReader(shards), None, fields, 0, batch, batch, chosen)
