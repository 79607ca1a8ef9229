"""Look after shards: build their indices, check every byte, look inside.

    python -m tools.shards index   'laion/{00000..00099}.tar'
    python -m tools.shards verify  data/coco/train
    python -m tools.shards inspect data/coco/train --sample 000000000785
    python -m tools.shards quarantine RUN --release 000000000785
    python -m tools.shards stats   data/coco/train
    python -m tools.shards sheet   data/coco/train --out look.png
    python -m tools.shards repack  data/a data/b --out data/ab --fractions train=0.9,val=0.1
    python -m tools.shards plan    data/coco/train --max-gib 10 50
    python -m tools.shards bench   data/coco/train
    python -m tools.shards serve   data/coco --port 8000 --delay-ms 50

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
from collections.abc import Callable, Collection, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.console import parse_in_any_order, write_utf8
from data_pipeline.filters.expressions import TEXT_COLUMNS
from data_pipeline.reading.reader import BadSample, Sample, SampleReader, TransientReadError
from data_pipeline.shards import manifest as manifests
from data_pipeline.shards.columns import column_names
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.names import Catalogue, expand_specs
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import base_name, folder_of, is_url, without_secrets
from data_pipeline.storage.remote import UrlStorage
from tools.shards.files import (
    IndexJob,
    VerifyJob,
    index_one,
    records_of,
    size_of,
    verify_one,
)
from tools.shards.find_sample import row_of
from tools.support.arguments import positive

Advance = Callable[[int], None]

_MODULES = {
    "stats": "counts, bytes, sizes of images, lengths of captions, labels; from the indices",
    "sheet": "draw a few samples with captions, boxes and labels as one picture",
    "repack": "merge, filter, split, shuffle and pack anew; the bytes of samples do not change",
    "plan": "say what a cache on each node will save, by simulation of the order of reading",
    "bench": "time reading, decoding, cropping and the whole loader, on this machine",
    "quarantine": "list the samples that a run leaves out, take some back, or leave out more",
    "serve": "serve a folder of shards over HTTP, to try things out; not for production",
}
"""Sub-commands in files of their own, NAME.py beside this one."""

_REQUESTS = 16
_TEXT_EXTENSIONS = ("json", "txt", "cls")
_TEXT_SHOWN = 500
_KEYS_SHOWN = 5
_EXTENSIONS_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    write_utf8()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_in_any_order(_parser(next(iter(arguments), None)), arguments)
    try:
        return options.run(options)
    except (ShardError, BadSample, TransientReadError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _index(options: argparse.Namespace) -> int:
    storage = UrlStorage()
    paths = expand_specs(options.shards, storage)
    if options.out is not None:
        os.makedirs(options.out, exist_ok=True)
        names = Counter(base_name(path) for path in paths)
        if clash := next((name for name, count in names.items() if count > 1), None):
            raise ShardError(f"--out: several shards are named {clash}; index them one by one")
    job = IndexJob(storage, options.force, options.full, options.out)
    faults, samples = 0, 0
    for path, result in _for_each(index_one, paths, options.processes, job):
        if isinstance(result, str):
            faults += 1
            print(f"error: {result}", file=sys.stderr)
            continue
        samples += result
        if options.verbose:
            print(f"{without_secrets(path)}: {result} samples")
    print(f"{len(paths) - faults} shards indexed, {samples:,} samples; {faults} shards damaged")
    return 1 if faults else 0


def _verify(options: argparse.Namespace) -> int:
    storage = UrlStorage()
    paths = expand_specs(options.shards, storage)
    job = VerifyJob(storage, records_of(paths, storage))
    damaged_samples, damaged_shards, samples = 0, 0, 0
    for path, (faults, in_samples, count) in _for_each(verify_one, paths, options.processes, job):
        samples += count
        damaged_samples += in_samples
        damaged_shards += bool(faults)
        for fault in faults:
            print(fault)
        if options.verbose and not faults:
            print(f"{without_secrets(path)}: {count} samples, whole")
    print(
        f"{len(paths)} shards, {samples:,} samples: {damaged_shards} shards with faults, "
        f"{damaged_samples} damaged samples"
    )
    return 1 if damaged_shards else 0


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
    print(f"first shard: {shards.shards[0].label}: {len(first):,} samples")
    if not first.payloads_hashed:
        print("  indexed by its headers: damage inside of payloads is not seen (index --full)")
    counts = Counter(first.extension_counts()).most_common()
    print("  members: " + ", ".join(f"{e} x {n:,}" for e, n in counts[:_EXTENSIONS_SHOWN]))
    if len(counts) > _EXTENSIONS_SHOWN:
        print(f"  and {len(counts) - _EXTENSIONS_SHOWN} more extensions: are there dots in keys?")
    if first.bundled:
        print("  its samples lie in bundles")
    print("  columns: " + (", ".join(sorted(column_names(first))) or "none"))
    print("  columns of texts: " + ", ".join(sorted(_usable_texts(first))))
    dropped = first.dropped_columns + (first.derived.dropped if first.derived else 0)
    if dropped:
        print(f"  {dropped} more fields are not kept as columns")
    if first.passed_over:
        print(f"  {first.passed_over} files belong to no sample (no extension, or hidden)")
    for row in range(min(_KEYS_SHOWN, len(first))):
        members = ", ".join(f"{m[0]} {m[2]:,} B" for m in first.members(row))
        print(f"  {row}: {first.key(row)} ({members})")
    return 0


def _usable_texts(index: ShardIndex) -> set[str]:
    """Columns of texts that conditions can look at."""
    texts = index.derived.texts if index.derived else {}
    return {*TEXT_COLUMNS, *(name for name, column in texts.items() if column is not None)}


def _print_manifests(shards: ShardSet) -> None:
    catalogue = Catalogue(shards.storage)
    for folder in dict.fromkeys(folder_of(shard.path) for shard in shards.shards):
        manifest = catalogue.manifest(folder)
        shown = without_secrets(folder or ".")
        if manifest is None:
            print(f"{shown}: no manifest")
            continue
        print(f"{shown}/{manifests.FILE_NAME}:")
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
    text = data.decode("utf-8-sig", "backslashreplace")
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


def _for_each(
    action: Callable[[str, Any, Advance | None], Any],
    paths: list[str],
    processes: int,
    job: IndexJob | VerifyJob,
) -> list[tuple[str, Any]]:
    """Return (path, action(path, job, ...)) of all paths, with a progress bar in bytes."""
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as threads:
        found = threads.map(lambda path: size_of(path, job.storage), dict.fromkeys(paths))
        sizes = dict(zip(dict.fromkeys(paths), found, strict=True))
    results: dict[str, Any] = {}
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(sizes.values()))
        if processes == 1 or len(sizes) == 1:
            for path in sizes:
                results[path] = action(path, job, functools.partial(bar.advance, task))
        else:
            with _executor(sizes, processes) as executor:
                waiting = {executor.submit(action, path, job, None): path for path in sizes}
                for future in concurrent.futures.as_completed(waiting):
                    results[waiting[future]] = future.result()
                    bar.advance(task, sizes[waiting[future]])
        bar.update(task, completed=sum(sizes.values()))
    return [(path, results[path]) for path in paths]


def _executor(paths: Collection[str], processes: int) -> concurrent.futures.Executor:
    """Processes for shards of this machine; threads for those of servers, which are waited for."""
    if all(map(is_url, paths)):
        return concurrent.futures.ThreadPoolExecutor(min(_REQUESTS, len(paths)))
    return concurrent.futures.ProcessPoolExecutor(
        min(processes, len(paths)), multiprocessing.get_context("spawn")
    )


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = _add_command(commands, "index", "build the indices that are missing", _index)
    index.add_argument("--force", action="store_true", help="also those that exist")
    index.add_argument(
        "--full",
        action="store_true",
        help="read all bytes of remote shards that have no index beside them, for its checksums; "
        "the default reads their headers only",
    )
    index.add_argument(
        "--out", metavar="FOLDER", help="write a copy of each index there, to be uploaded"
    )
    verify = _add_command(commands, "verify", "check every byte; list damaged samples", _verify)
    for command in (index, verify):
        command.add_argument("--verbose", action="store_true", help="a line for each shard")
        command.add_argument(
            "--processes", type=positive, default=os.cpu_count() or 1, help="(default %(default)s)"
        )
    inspect = _add_command(commands, "inspect", "show counts, fields, columns and keys", _inspect)
    inspect.add_argument("--sample", metavar="KEY|ROW", help="print the members of one sample")
    for name, text in _MODULES.items():
        # Only the chosen one is imported: some need libraries that take seconds to load, which
        # every process that indexes or verifies would load, too.
        if name == chosen:
            importlib.import_module(f"tools.shards.{name}").add_command(commands, text)
        else:
            commands.add_parser(name, help=text)
    return parser


def _add_command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "shards", nargs="+", help="folders, tars, globs, URLs or {000..123} expressions"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
