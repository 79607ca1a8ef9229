"""`python -m tools.shards repack`: samples of shards into other shards, their bytes unchanged.

Merges inputs, keeps what meets a condition, splits by a keyed hash, shuffles, and packs anew:
other sizes of shards, bundles or none. Parallel, resumable and reproducible as make_shards.
"""

import argparse
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.filters.select import select_rows
from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.rng import keyed_u64
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.names import Catalogue
from data_pipeline.shards.packer import sample_bytes
from data_pipeline.shards.packing import PackJob, SampleFault, plan_ranges
from data_pipeline.shards.shard_set import ShardSet, load_or_build_index
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import folder_of, is_url
from data_pipeline.storage.remote import UrlStorage
from tools.make_shards.options import (
    add_packing_options,
    byte_count,
    classes_of,
    command_of,
    licence_of,
    split_name,
)
from tools.make_shards.run import run_jobs
from tools.shards.tar_salvage import salvage

_SHOWN = 5
_log = logging.getLogger("omnipretrain.data")


@dataclass
class CopySample:
    """Makes the members of row `item` of some shards: those that it has, checked."""

    shards: ShardSet = field(repr=False)
    fingerprint: str
    """Of the shards: with it the `repr` tells what every row is."""
    _reader: SampleReader | None = field(default=None, repr=False)

    def __call__(self, item: int) -> dict[str, bytes]:
        """Read the sample. Errors: SampleFault if it is damaged."""
        if self._reader is None:
            self._reader = SampleReader(self.shards)
        try:
            return self._reader.read(item).members
        except BadSample as error:
            raise SampleFault(str(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open files."""
        return {**self.__dict__, "_reader": None}


@dataclass(frozen=True)
class Input:
    """One of the inputs that are merged."""

    name: str
    shards: ShardSet
    manifests: list[Manifest]
    """Of the folders that its shards lie in."""
    saved: dict[str, int] = field(default_factory=dict)
    """Damaged tar -> samples that were saved from it."""
    lost: list[str] = field(default_factory=list)
    """A line for each thing that was not."""


def add_command(commands: Any, text: str) -> None:
    """Add `repack` to the sub-commands of tools.shards; `text` says what it does."""
    parser = commands.add_parser("repack", help=text, description=text)
    parser.set_defaults(run=run, source="repack")
    parser.add_argument("shards", nargs="+", help="inputs: folders, tars, globs or {000..123}")
    add_packing_options(parser)
    parser.add_argument(
        "--fractions",
        type=_fractions,
        metavar="NAME=F,...",
        help="split by a hash of the key and --seed, e.g. train=0.9,val=0.1 (default: train=1)",
    )
    parser.add_argument("--where", metavar="CONDITION", help="on index columns: 'width >= 256'")
    parser.add_argument(
        "--keep-order", action="store_true", help="leave samples in their order: no shuffle"
    )
    parser.add_argument(
        "--on-clash",
        choices=("error", "prefix", "first"),
        default="error",
        help="keys that stand for several samples: stop, put the number of the input before them, "
        "or keep the first sample (default %(default)s)",
    )
    parser.add_argument(
        "--on-damage",
        choices=("error", "skip"),
        default="error",
        help="what to do with damaged samples; skip also saves what is whole from tars that are "
        "cut, joined, without an end, or damaged between members (default %(default)s)",
    )
    parser.add_argument("--max-bytes", type=byte_count, help="per shard, e.g. 500M")
    parser.add_argument("--licence", help="text, or @FILE, in place of those of the inputs")
    parser.add_argument("--classes", type=Path, help="text file, in place of those of the inputs")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    with tempfile.TemporaryDirectory(prefix="repack-") as folder:
        return run_jobs(lambda: repack_jobs(options, Path(folder)), options.processes)


def repack_jobs(options: argparse.Namespace, links: Path) -> Iterator[PackJob]:
    """Yield a job for each split, in the order of --fractions.

    links: an empty folder that lasts as long as the jobs.

    Errors: ValueError naming the inputs for keys or classes that clash, and for splits that nothing
    falls into; ShardError, OSError.
    """
    if options.on_damage == "skip":
        inputs = [_open_damaged(spec, links / str(n)) for n, spec in enumerate(options.shards)]
    else:
        inputs = [_open(spec) for spec in options.shards]
    lost = [line for one in inputs for line in one.lost]
    shards = ShardSet(itertools.chain.from_iterable(i.shards.shards for i in inputs))
    classes = classes_of(options) or _common_classes(inputs)
    rows = np.arange(len(shards))
    if options.where is not None:
        selection = select_rows(shards, options.where)
        rows = selection.select(np.arange(selection.n_kept))
    keys = _keys(shards, rows)
    fractions = options.fractions or {"train": 1.0}
    parts = _split(keys, fractions, options.seed)
    rows, keys, parts, clashes = _resolved(rows, keys, parts, inputs, options.on_clash)
    build = CopySample(shards, shards.fingerprint)
    for number, split in enumerate(fractions):  # before any is packed
        if not np.any(parts == number):
            raise ValueError(f"split {split!r} is empty: of {len(rows)} samples none falls into it")
    for number, split in enumerate(fractions):
        chosen = np.flatnonzero(parts == number)
        if not options.keep_order:
            generator = np.random.Generator(np.random.Philox(options.seed))
            chosen = chosen[generator.permutation(len(chosen))]
        items = rows[chosen].tolist()
        names = [keys[place] for place in chosen.tolist()]
        sizes = _sizes(shards, items, names, options.bundle)
        yield PackJob(
            folder=options.out / split,
            prefix=split,
            keys=names,
            items=items,
            ranges=plan_ranges(sizes, options.max_samples, options.max_bytes),
            build=build,
            skip_faults=options.on_damage == "skip",
            bundle=options.bundle,
            licence=licence_of(options) or _licences(inputs),
            command=command_of(options, "shards"),
            classes=classes,
            details={
                "seed": options.seed,
                "missing": 0 if number else len(lost),
                "clashing_keys": clashes,
                "inputs": [_described(one) for one in inputs],
            },
            account={
                "saved_of_damaged_shards": {k: v for one in inputs for k, v in one.saved.items()}
            },
            missing=() if number else lost,  # of the inputs: named once
        )


def _open(spec: str) -> Input:
    shards = ShardSet.open(spec)
    return Input(spec, shards, _manifests([shard.path for shard in shards.shards]))


def _open_damaged(spec: str, links: Path) -> Input:
    """As `_open`, with what is whole in place of tars that cannot be read.

    Errors: ShardError also if nothing of the input is whole.
    """
    paths, saved, lost, readable = Catalogue(UrlStorage()).expand(spec), {}, [], []
    first: ShardError | None = None
    for number, path in enumerate(paths):
        try:
            if not is_url(path):
                load_or_build_index(path)
            readable.append(path)
        except ShardError as error:
            first = first or error
            found = salvage(path, links / str(number))
            _log.warning("%s; %d samples of it are saved", error, found.samples)
            readable += found.links
            lost += found.lost
            saved[path] = found.samples
    if first is not None and not readable:
        raise first
    return Input(spec, ShardSet.open(readable), _manifests(paths), saved, lost)


def _manifests(paths: list[str]) -> list[Manifest]:
    catalogue = Catalogue(UrlStorage())
    found = [catalogue.manifest(folder) for folder in dict.fromkeys(map(folder_of, paths))]
    return [manifest for manifest in found if manifest is not None]


def _described(one: Input) -> dict[str, Any]:
    """What the manifest remembers of an input."""
    return {
        "shards": one.name,
        "fingerprint": one.shards.fingerprint,
        "samples": len(one.shards),
        "commands": [manifest.command for manifest in one.manifests if manifest.command],
        "details": [
            {k: v for k, v in manifest.details.items() if k != "plan"} for manifest in one.manifests
        ],
    }


def _common_classes(inputs: list[Input]) -> list[str] | None:
    """Return the classes of the inputs that have them; labels must mean the same in all."""
    first: tuple[str, list[str]] | None = None
    for one in inputs:
        for manifest in one.manifests:
            if manifest.classes is None:
                continue
            if first is not None and manifest.classes != first[1]:
                pairs = enumerate(itertools.zip_longest(first[1], manifest.classes))
                label, (theirs, other) = next((n, p) for n, p in pairs if p[0] != p[1])
                raise ValueError(
                    f"classes clash: label {label} is {theirs!r} in {first[0]} and {other!r} in "
                    f"{one.name}. Pack the sources again with one list of classes, or, if you know "
                    "the labels to be right, give it here (--classes FILE)"
                )
            first = first or (one.name, manifest.classes)
    return first[1] if first else None


def _licences(inputs: list[Input]) -> str:
    """Return all lines of all licences, each once."""
    lines = (line for one in inputs for m in one.manifests for line in m.licence.splitlines())
    return "\n".join(dict.fromkeys(lines))


def _keys(shards: ShardSet, rows: np.ndarray) -> list[str]:
    keys = []
    ends = np.cumsum([shard.samples for shard in shards.shards])
    for number, end in enumerate(ends.tolist()):
        begin = end - shards.shards[number].samples
        inside = rows[np.searchsorted(rows, begin) : np.searchsorted(rows, end)] - begin
        if len(inside):
            names = shards.index(number).keys()
            keys += [names[row] for row in inside.tolist()]
    return keys


def _split(keys: list[str], fractions: dict[str, float], seed: int) -> np.ndarray:
    """Return the number of the split of each key, len(fractions) for none: a hash of key and seed.

    So a sample stays in its split when others come or go, and all samples of a key stay together.
    """
    bounds = np.cumsum(list(fractions.values()))
    if len(fractions) == 1 and bounds[0] >= 1:
        return np.zeros(len(keys), np.int64)
    draws = np.array([keyed_u64(seed, "split", key) / 2**64 for key in keys])
    bounds[-1] = bounds[-1] if bounds[-1] < 1 - 1e-9 else 1.0
    return np.searchsorted(bounds, draws, side="right")


def _resolved(
    rows: np.ndarray, keys: list[str], parts: np.ndarray, inputs: list[Input], on_clash: str
) -> tuple[np.ndarray, list[str], np.ndarray, int]:
    """Return rows, keys and splits in which no key stands for two samples, and how many did."""
    counts = Counter(keys)
    clashing = {key for key, count in counts.items() if count > 1}
    if not clashing:
        return rows, keys, parts, 0
    ends = np.cumsum([len(one.shards) for one in inputs])
    numbers = np.searchsorted(ends, rows, side="right").tolist()
    if on_clash == "error":
        shown = []
        for key in sorted(clashing)[:_SHOWN]:
            where = [inputs[n].name for k, n in zip(keys, numbers, strict=True) if k == key]
            shown.append(f"{key!r} in {' and '.join(dict.fromkeys(where))} ({counts[key]} times)")
        more = f"\n  and {len(clashing) - _SHOWN} more" if len(clashing) > _SHOWN else ""
        raise ValueError(
            f"{len(clashing)} keys stand for several samples:\n  "
            + "\n  ".join(shown)
            + more
            + "\n(--on-clash prefix tells them apart, --on-clash first keeps one of each)"
        )
    if on_clash == "prefix":
        pairs = zip(keys, numbers, strict=True)
        named = [f"{number}/{key}" if key in clashing else key for key, number in pairs]
        named = _told_apart(named)
        return rows, named, parts, len(clashing)
    firsts = np.array(sorted({key: at for at, key in reversed(list(enumerate(keys)))}.values()))
    return rows[firsts], [keys[at] for at in firsts.tolist()], parts[firsts], len(clashing)


def _told_apart(keys: list[str]) -> list[str]:
    """Keys that one input has several times get a number of their own: "0/a", "0-2/a"."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        seen[key] += 1
        number, slash, rest = key.partition("/")
        found.append(key if seen[key] == 1 else f"{number}-{seen[key]}{slash}{rest}")
    return found


def _sizes(shards: ShardSet, rows: list[int], keys: list[str], bundle: int) -> Iterator[int]:
    for row, key in zip(rows, keys, strict=True):
        number, local = shards.locate(row)
        members = shards.index(number).members(local)
        yield sample_bytes(key, {member[0]: member[2] for member in members}, bundle)


def _fractions(text: str) -> dict[str, float]:
    """Parse "train=0.9,val=0.1"."""
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1 or name in fractions:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=FRACTION, each name once")
        fractions[split_name(name)] = share
    if sum(fractions.values()) > 1 + 1e-9:
        raise argparse.ArgumentTypeError(f"{text!r}: the fractions add up to more than 1")
    return fractions
