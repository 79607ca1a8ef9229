"""Look after shards: build their indices, check every byte, look inside.

    python -m tools.shards index   'laion/{00000..00099}.tar'
    python -m tools.shards verify  data/coco/train
    python -m tools.shards inspect data/coco/train --sample 000000000785
    python -m tools.shards quarantine RUN --release 000000000785
    python -m tools.shards stats   data/coco/train
    python -m tools.shards sheet   data/coco/train --out look.png
    python -m tools.shards repack  data/a data/b --out data/ab --fractions train=0.9,val=0.1
    python -m tools.shards bench   data/coco/train

Exit codes: 0 all is well; 1 damage or another error was found, and printed; 2 wrong usage.
"""

import argparse
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline import manifest as manifests
from data_pipeline.catalogue import expand_specs
from data_pipeline.columns import column_names
from data_pipeline.expressions import TEXT_COLUMNS
from data_pipeline.index import ShardIndex
from data_pipeline.index_builder import build_index
from data_pipeline.reader import BadSample, Sample, SampleReader, TransientReadError
from data_pipeline.shards import ShardSet, load_or_build_index, stored_index
from data_pipeline.tar_headers import ShardError
from data_pipeline.verify import verify_shard
from tools.find_sample import row_of

Advance = Callable[[int], None]

_MODULES = {
    "stats": "counts, bytes, sizes of images, lengths of captions, labels; from the indices",
    "sheet": "draw a few samples with captions, boxes and labels as one picture",
    "repack": "merge, filter, split, shuffle and pack anew; the bytes of samples do not change",
    "bench": "time reading, decoding, cropping and the whole loader, on this machine",
    "quarantine": "list the samples that a run leaves out, take some back, or leave out more",
}
"""Sub-commands in files of their own, tools/shards_NAME.py."""

_TEXT_EXTENSIONS = ("json", "txt", "cls")
_TEXT_SHOWN = 500
_KEYS_SHOWN = 5
_EXTENSIONS_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(next(iter(arguments), None)).parse_args(arguments)
    try:
        return options.run(options)
    except (ShardError, BadSample, TransientReadError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _index(options: argparse.Namespace) -> int:
    paths = expand_specs(options.shards)
    faults, samples = 0, 0
    for path, result in _for_each(_index_one, paths, options.processes, options.force):
        if isinstance(result, str):
            faults += 1
            print(f"error: {result}", file=sys.stderr)
            continue
        samples += result
        if options.verbose:
            print(f"{path}: {result} samples")
    print(f"{len(paths) - faults} shards indexed, {samples:,} samples; {faults} shards damaged")
    return 1 if faults else 0


def _index_one(path: str, force: bool, progress: Advance | None) -> int | str:
    """Return the number of samples, or what is wrong."""
    try:
        return len(load_or_build_index(path, force=force, progress=progress))
    except (ShardError, OSError) as error:
        return _with_path(path, error)


def _verify(options: argparse.Namespace) -> int:
    paths = expand_specs(options.shards)
    records = _manifest_records(paths)
    damaged_samples, damaged_shards, samples = 0, 0, 0
    for path, (faults, in_samples, count) in _for_each(
        _verify_one, paths, options.processes, records
    ):
        samples += count
        damaged_samples += in_samples
        damaged_shards += bool(faults)
        for fault in faults:
            print(fault)
        if options.verbose and not faults:
            print(f"{path}: {count} samples, whole")
    print(
        f"{len(paths)} shards, {samples:,} samples: {damaged_shards} shards with faults, "
        f"{damaged_samples} damaged samples"
    )
    return 1 if damaged_shards else 0


def _verify_one(
    path: str, records: dict[str, manifests.ShardRecord], progress: Advance | None
) -> tuple[list[str], int, int]:
    """Return (faults, number of damaged samples, number of samples) of a shard."""
    record = records.get(path)
    try:
        # Without an index there are no checksums to compare, but the structure can be checked.
        index = stored_index(path) or build_index(path)
        report = verify_shard(path, index, progress)
    except (ShardError, OSError) as error:
        return [_with_path(path, error)], 0, record.samples if record else 0
    faults = list(report.faults)
    if record is not None and index.digest != record.index_digest:
        faults.append(f"{path}: its index is not the one of the manifest: swapped or replaced")
    faults += [f"{path}: sample {key!r}: {fault}" for key, fault in report.damaged.items()]
    if record is not None and report.sha256 != record.sha256 and not faults:
        faults.append(
            f"{path}: its sha256 is not that of the manifest, though all samples are whole: bytes "
            "between or behind the members differ"
        )
    return faults, len(report.damaged), len(index)


def _inspect(options: argparse.Namespace) -> int:
    shards = ShardSet.open(options.shards)
    if options.sample is not None:
        with SampleReader(shards, retries=0) as reader:
            _print_sample(reader.read(row_of(shards, options.sample)))
        return 0
    print(f"{len(shards):,} samples in {len(shards.shards):,} shards")
    print(f"{sum(shard.bytes for shard in shards.shards) / 1e6:,.1f} MB")
    print(f"fingerprint {shards.fingerprint}")
    _print_manifests(shards)
    first = shards.index(0)
    print(f"first shard: {shards.shards[0].path}: {len(first):,} samples")
    counts = Counter(first.extension_counts()).most_common()
    print("  members: " + ", ".join(f"{e} x {n:,}" for e, n in counts[:_EXTENSIONS_SHOWN]))
    if len(counts) > _EXTENSIONS_SHOWN:
        print(f"  and {len(counts) - _EXTENSIONS_SHOWN} more extensions: are there dots in keys?")
    print("  columns: " + (", ".join(sorted(column_names(first))) or "none"))
    print("  columns of texts: " + (", ".join(sorted(_usable_texts(first))) or "none"))
    dropped = first.dropped_columns + (first.derived.dropped if first.derived else 0)
    if dropped:
        print(f"  {dropped} more fields are not kept as columns")
    if first.passed_over:
        print(f"  {first.passed_over} files belong to no sample (no extension, or hidden)")
    for row in range(min(_KEYS_SHOWN, len(first))):
        members = ", ".join(f"{m[0]} {m[2]:,} B" for m in first.members(row))
        print(f"  {row}: {first.key(row)} ({members})")
    return 0


def _usable_texts(index: ShardIndex) -> list[str]:
    """Columns of texts that conditions can look at."""
    texts = index.derived.texts if index.derived else {}
    return [*TEXT_COLUMNS, *(name for name, column in texts.items() if column is not None)]


def _print_manifests(shards: ShardSet) -> None:
    for folder in dict.fromkeys(os.path.dirname(shard.path) for shard in shards.shards):
        try:
            manifest = manifests.Manifest.load(folder or ".")
        except FileNotFoundError:
            print(f"{folder or '.'}: no manifest")
            continue
        print(f"{folder or '.'}/{manifests.FILE_NAME}:")
        members = ", ".join(f"{e} x {n:,}" for e, n in manifest.fields.items())
        print(_shorten(f"  members: {members}"))
        if manifest.classes:
            print(_shorten(f"  {len(manifest.classes)} classes: {', '.join(manifest.classes)}"))
        licence = "; ".join(manifest.licence.splitlines())
        print(f"  licence: {_shorten(licence) or 'not given'}")
        print(f"  made by: {manifest.command or 'not given'}")


def _print_sample(sample: Sample) -> None:
    print(f"row {sample.row}: {sample.key} in {sample.shard}")
    for extension, data in sample.members.items():
        print(f"--- .{extension}: {len(data):,} bytes")
        if extension not in _TEXT_EXTENSIONS:
            continue
        print("\n".join(_shorten(line) for line in _text_lines(extension, data)))


def _text_lines(extension: str, data: bytes) -> list[str]:
    """Return a text member as lines: a line per field for JSON objects."""
    text = data.decode("utf-8", "backslashreplace")
    if extension == "json":
        try:
            content = json.loads(text)
        except ValueError as error:
            return [f"(not valid JSON: {error})", text]
        if isinstance(content, dict):
            return [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in content.items()]
    return text.splitlines()


def _shorten(line: str) -> str:
    return line if len(line) <= _TEXT_SHOWN else f"{line[:_TEXT_SHOWN]} ... ({len(line):,})"


def _manifest_records(paths: list[str]) -> dict[str, manifests.ShardRecord]:
    records = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        try:
            for record in manifests.Manifest.load(folder or ".").shards:
                records[os.path.join(folder, record.name)] = record
        except FileNotFoundError:
            continue
    return records


def _with_path(path: str, error: Exception) -> str:
    return str(error) if path in str(error) else f"{path}: {error}"


def _for_each(
    action: Callable[[str, Any, Advance | None], Any],
    paths: list[str],
    processes: int,
    argument: object,
) -> list[tuple[str, Any]]:
    """Return (path, action(path, argument, ...)) of all paths, with a progress bar in bytes."""
    sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}
    results: dict[str, Any] = {}
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(sizes.values()))
        if processes == 1 or len(sizes) == 1:
            for path in sizes:
                results[path] = action(path, argument, functools.partial(bar.advance, task))
        else:
            with concurrent.futures.ProcessPoolExecutor(
                min(processes, len(sizes)), multiprocessing.get_context("spawn")
            ) as executor:
                waiting = {executor.submit(action, path, argument, None): path for path in sizes}
                for future in concurrent.futures.as_completed(waiting):
                    results[waiting[future]] = future.result()
                    bar.advance(task, sizes[waiting[future]])
        bar.update(task, completed=sum(sizes.values()))
    return [(path, results[path]) for path in paths]


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = _add_command(commands, "index", "build the indices that are missing", _index)
    index.add_argument("--force", action="store_true", help="also those that exist")
    verify = _add_command(commands, "verify", "check every byte; list damaged samples", _verify)
    for command in (index, verify):
        command.add_argument("--verbose", action="store_true", help="a line for each shard")
        command.add_argument(
            "--processes", type=int, default=os.cpu_count() or 1, help="(default %(default)s)"
        )
    inspect = _add_command(commands, "inspect", "show counts, fields, columns and keys", _inspect)
    inspect.add_argument("--sample", metavar="KEY|ROW", help="print the members of one sample")
    for name, text in _MODULES.items():
        # Only the chosen one is imported: some need libraries that take seconds to load, which
        # every process that indexes or verifies would load, too.
        if name == chosen:
            importlib.import_module(f"tools.shards_{name}").add_command(commands, text)
        else:
            commands.add_parser(name, help=text)
    return parser


def _add_command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
