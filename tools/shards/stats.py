"""`python -m tools.shards stats`: what is in shards, from their indices alone."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.files import write_atomically
from data_pipeline.shards.columns import BYTES_PREFIX, column_names, column_of
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.names import Catalogue
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.locations import folder_of
from data_pipeline.storage.remote import UrlStorage

_LABEL_COLUMNS = ("label", "cls")
_LABELS_SHOWN = 20
_COLUMNS_SHOWN = 30
_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def add_command(commands: Any, text: str) -> None:
    """Add `stats` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("stats", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    parser.add_argument("--by-shard", action="store_true", help="also a line for each shard")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    shards = ShardSet.open(options.shards)
    figures = shard_statistics(shards)
    if options.json is not None:
        write_atomically(options.json, [json.dumps(figures, indent=1).encode(), b"\n"])
    _show(figures, options.by_shard, Console(width=None if Console().is_terminal else 120))
    return 0


def shard_statistics(shards: ShardSet) -> dict[str, Any]:
    """Return figures of the whole set and of each shard, as JSON can hold them.

    samples, bytes; members: extension -> samples, bytes, and quantiles of their size; columns:
    name -> samples that have it, mean and quantiles; labels: class name or number -> samples;
    unlabelled: samples without; shards: name, samples, bytes, columns (median), labels (number).

    Errors: ShardError, OSError.
    """
    indices = [shards.index(number) for number in range(len(shards.shards))]
    names = sorted(set().union(*map(column_names, indices)))
    columns = {name: [_values(index, name) for index in indices] for name in names}
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    label_column = next((name for name in _LABEL_COLUMNS if name in whole), None)
    labels = whole[label_column] if label_column else np.empty(0)
    found = labels[~np.isnan(labels)]
    return {
        "samples": len(shards),
        "bytes": sum(shard.bytes for shard in shards.shards),
        "members": {
            name.removeprefix(BYTES_PREFIX): {"bytes": int(np.nansum(values)), **_summary(values)}
            for name, values in whole.items()
            if name.startswith(BYTES_PREFIX)
        },
        "columns": {
            name: _summary(values)
            for name, values in whole.items()
            if not name.startswith(BYTES_PREFIX)
        },
        "labels": _histogram(found, _classes(shards)),
        "unlabelled": len(shards) - len(found),
        "shards": [
            {
                "name": shard.name,
                "samples": shard.samples,
                "bytes": shard.bytes,
                "columns": {name: _median(parts[number]) for name, parts in columns.items()},
                "labels": len(np.unique(columns[label_column][number])) if label_column else 0,
            }
            for number, shard in enumerate(shards.shards)
        ],
    }


def _values(index: ShardIndex, name: str) -> np.ndarray:
    """Return a column as (N,) float64; NaN where a sample, or the whole shard, lacks it."""
    values = column_of(index, name)
    return np.full(len(index), np.nan) if values is None else values.astype(np.float64)


def _summary(values: np.ndarray) -> dict[str, float | int]:
    there = values[np.isfinite(values)]
    if not len(there):
        return {"samples": 0}
    quantiles = np.quantile(there, list(_QUANTILES.values())).tolist()
    return {
        "samples": len(there),
        "mean": float(there.mean()),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }


def _median(values: np.ndarray) -> float | None:
    there = values[np.isfinite(values)]
    return float(np.median(there)) if len(there) else None


def _classes(shards: ShardSet) -> list[str] | None:
    """Return the class names, if all manifests that have any agree."""
    catalogue = Catalogue(UrlStorage())
    folders = dict.fromkeys(folder_of(shard.path) for shard in shards.shards)
    found = [m.classes for m in map(catalogue.manifest, folders) if m is not None and m.classes]
    return found[0] if found and all(classes == found[0] for classes in found) else None


def _histogram(labels: np.ndarray, classes: list[str] | None) -> dict[str, int]:
    """Return class name (or number) -> samples, by label."""
    counts = Counter(labels.tolist())
    named: dict[str, int] = {}
    for label in sorted(counts):
        whole = float(label).is_integer()
        known = classes is not None and whole and 0 <= label < len(classes)
        name = classes[int(label)] if known else str(int(label) if whole else label)
        named[name] = named.get(name, 0) + counts[label]  # two classes may share a name
    return named


def _show(figures: dict[str, Any], by_shard: bool, console: Console) -> None:
    console.print(
        f"{figures['samples']:,} samples in {len(figures['shards']):,} shards, "
        f"{figures['bytes'] / 1e6:,.1f} MB",
        highlight=False,
    )
    quantiles = list(_QUANTILES)
    table = _table("bytes of members", ["extension", "samples", "MB", "mean", *quantiles])
    for name, summary in figures["members"].items():
        row = [summary["samples"], summary["bytes"] / 1e6, *_cells(summary)]
        table.add_row(name, *map(_text, row))
    console.print(table)
    columns = list(figures["columns"].items())
    table = _table("columns", ["name", "samples", "mean", *quantiles])
    for name, summary in columns[:_COLUMNS_SHOWN]:
        table.add_row(name, *map(_text, [summary["samples"], *_cells(summary)]))
    console.print(table)
    if len(columns) > _COLUMNS_SHOWN:
        console.print(f"and {len(columns) - _COLUMNS_SHOWN} more columns (--json has them all)")
    if figures["labels"]:
        console.print(_labels(figures))
    if by_shard:
        console.print(_by_shard(figures))


def _labels(figures: dict[str, Any]) -> Table:
    counts = Counter(figures["labels"]).most_common()
    title = f"{len(counts)} labels, {figures['unlabelled']:,} samples without"
    table = _table(title, ["label", "samples", "share", ""])
    for name, count in counts[:_LABELS_SHOWN]:
        bar = "#" * round(30 * count / counts[0][1])
        table.add_row(name, _text(count), f"{count / figures['samples']:.1%}", bar)
    if len(counts) > _LABELS_SHOWN:
        rest = counts[_LABELS_SHOWN:]
        table.add_row(f"{len(rest)} others", _text(sum(count for _, count in rest)), "", "")
    return table


def _by_shard(figures: dict[str, Any]) -> Table:
    medians = [n for n in ("width", "height", "captions.count") if n in figures["columns"]]
    table = _table("shards", ["name", "samples", "MB", *(f"median {n}" for n in medians), "labels"])
    for shard in figures["shards"]:
        row = [shard["samples"], shard["bytes"] / 1e6, *(shard["columns"][n] for n in medians)]
        table.add_row(shard["name"], *map(_text, [*row, shard["labels"]]))
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column else "left")
    return table


def _cells(summary: dict[str, Any]) -> list[float | None]:
    return [summary.get(name) for name in ("mean", *_QUANTILES)]


def _text(value: float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
