"""Documents as rows of token ids, all of one length, for masked language modelling.

Documents are shuffled, tokenised, joined with a separator, and cut every `--tokens` ids: the rest
of a document opens the next row, so that nothing is lost; only the last row is shorter. The ids of
all documents are first written to a file beside the shards, which is removed when they are packed;
started again after an interruption, the command does not tokenise again.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.files import write_atomically
from data_pipeline.plain_text import decoded, json_bytes, parsed_json
from data_pipeline.samples.tokenizer import ID_TYPES, Tokenizer
from data_pipeline.shards.packer import sample_bytes
from data_pipeline.shards.packing import PackJob, SampleFault, plan_ranges
from tools.make_shards.options import add_data_source, command_of, licence_of
from tools.make_shards.walk import walk_suffix
from tools.support.arguments import positive

_DOCUMENTS_AT_ONCE = 1024
_FAULTS_SHOWN = 5


class Spool(NamedTuple):
    """All documents as one array of ids on disk, in the order of the rows."""

    ids: str
    """File of `extension` numbers (ID_TYPES)."""
    starts: str
    """File of int64: the first id of each document."""
    extension: str
    tokens: int
    documents: int
    left_out: list[str]
    """Documents that could not be read: where they are, and why."""
    empty: int
    """Documents without a token, which are passed over."""
    digest: str
    """sha256 of `ids` and `starts`."""


@dataclass(frozen=True)
class BuildRow:
    """Makes the members of row number `item`: the ids as little-endian integers, and a json."""

    spool: Spool
    length: int
    tokenizer: str
    """As Tokenizer.mark."""

    def __call__(self, item: int) -> dict[str, bytes]:
        """Cut the row out of the documents."""
        spool, begin = self.spool, item * self.length
        count = min(self.length, spool.tokens - begin)
        kind = ID_TYPES[spool.extension]
        ids = np.fromfile(spool.ids, kind, count, offset=begin * kind.itemsize)
        if len(ids) != count:
            raise OSError(f"{spool.ids}: has been cut: remove it and start again")
        starts = np.memmap(spool.starts, np.int64, "r")
        first, last = np.searchsorted(starts, [begin, begin + count])
        places = (starts[first:last] - begin).tolist()
        record = {"tokens": count, "starts": places, "tokenizer": self.tokenizer}
        return {spool.extension: ids.tobytes(), "json": json_bytes(record)}


def add_sources(sources: Any) -> None:
    """Add `text` to the sub-commands of make_shards."""
    parser = add_data_source(sources, "text", "documents as rows of token ids", _job)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="folders of .txt (a document each), .txt (one per line) or .jsonl (one per object)",
    )
    parser.add_argument("--text-field", default="text", help="of .jsonl (default %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="as tokenizer.path of recipes"
    )
    parser.add_argument("--tokens", type=positive, default=512, help="per row (default: 512)")
    parser.add_argument(
        "--separator",
        choices=("eos", "bos", "none"),
        default="eos",
        help="token of the tokenizer behind each document (default %(default)s)",
    )


def _job(options: argparse.Namespace) -> PackJob:
    tokenizer = Tokenizer.load(options.tokenizer)
    place = options.out / f".{options.split}-documents"  # and a digest of what they are
    separator = None
    if options.separator != "none":
        separator = getattr(tokenizer, f"{options.separator}_id")
    files, passed_over = _files(options.input)
    spool = spool_documents(files, options.text_field, tokenizer, separator, options.seed, place)
    if spool.left_out and options.on_missing == "error":
        shown = "\n  ".join(spool.left_out[:_FAULTS_SHOWN])
        raise SampleFault(
            f"{len(spool.left_out)} documents cannot be read:\n  {shown}\n(--on-missing skip "
            "leaves them out)"
        )
    rows = -(-spool.tokens // options.tokens)
    # The rows of a long document would lie together.
    order = np.random.Generator(np.random.Philox(options.seed)).permutation(rows).tolist()
    record = {"tokens": options.tokens, "starts": [], "tokenizer": tokenizer.mark}
    row_bytes = options.tokens * ID_TYPES[spool.extension].itemsize
    sizes = {spool.extension: row_bytes, "json": len(json_bytes(record)) + 128}
    size = sample_bytes("000000000", sizes, options.bundle)
    return PackJob(
        folder=options.out / options.split,
        prefix=options.split,
        keys=[f"{row:09d}" for row in order],
        items=order,
        ranges=plan_ranges((size for _ in order), options.max_samples, options.max_bytes),
        build=BuildRow(spool, options.tokens, tokenizer.mark),
        bundle=options.bundle,
        licence=licence_of(options),
        command=command_of(options),
        details={
            "seed": options.seed,
            "missing": len(spool.left_out),
            "documents": spool.documents,
            "empty_documents": spool.empty,
            "tokens": spool.tokens,
            "tokens_per_row": options.tokens,
            "tokenizer_digest": tokenizer.digest,
        },
        account={
            "rows": spool.documents + spool.empty + len(spool.left_out),
            "passed_over": passed_over,
        },
        missing=spool.left_out,
        scratch=[Path(spool.ids).with_suffix(s) for s in (".json", ".ids", ".starts")],
    )


def spool_documents(
    files: Sequence[tuple[Path, bool]],
    text_field: str,
    tokenizer: Tokenizer,
    separator: int | None,
    seed: int,
    place: Path,
) -> Spool:
    """Tokenise all documents in an order drawn by `seed`, to PLACE-DIGEST.ids and .starts.

    The digest is of files, their sizes and times, tokenizer and options: what an earlier call has
    finished (PLACE-DIGEST.json) is used again, and calls for other documents are not in the way.

    Args: files: path, and whether it holds a document per line; separator: id behind each document.
    Errors: ValueError if there is no token; OSError.
    """
    place = _identified(place, files, [text_field, tokenizer.digest, separator, seed])
    known = Path(f"{place}.json")
    if known.exists():
        return Spool(**json.loads(known.read_bytes()))
    place.parent.mkdir(parents=True, exist_ok=True)
    documents = _documents(files)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(documents))
    extension = "u16" if tokenizer.vocab_size <= 1 << 16 else "u32"
    kind, digest = ID_TYPES[extension], sha256()
    starts: list[int] = []
    left_out: list[str] = []

    def all_ids() -> Iterator[bytes]:
        total = 0
        for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
            chosen = documents[order[first : first + _DOCUMENTS_AT_ONCE]].tolist()
            texts = list(_texts(files, chosen, text_field, left_out))
            for ids in tokenizer.encode_many(texts):
                if not ids:
                    continue
                starts.append(total)
                ids = [*ids, separator] if separator is not None else ids
                total += len(ids)
                data = np.array(ids, kind).tobytes()
                digest.update(data)
                yield data
        if not total:
            raise ValueError(f"no text in {len(documents)} documents of {len(files)} files")

    write_atomically(Path(f"{place}.ids"), all_ids())
    total = os.path.getsize(f"{place}.ids") // kind.itemsize
    starts_bytes = np.array(starts, np.int64).tobytes()
    digest.update(starts_bytes)
    write_atomically(Path(f"{place}.starts"), [starts_bytes])
    spool = Spool(
        ids=f"{place}.ids",
        starts=f"{place}.starts",
        extension=extension,
        tokens=total,
        documents=len(starts),
        left_out=sorted(left_out),
        empty=len(order) - len(starts) - len(left_out),
        digest=digest.hexdigest(),
    )
    write_atomically(known, [json.dumps(spool._asdict()).encode()])
    return spool


def _identified(place: Path, files: Sequence[tuple[Path, bool]], options: list[Any]) -> Path:
    """Return a name that only the same files and options have."""
    state = [(os.fspath(p), lines, p.stat().st_size, p.stat().st_mtime_ns) for p, lines in files]
    digest = sha256(json.dumps([state, options]).encode()).hexdigest()
    return Path(f"{place}-{digest[:16]}")


def _files(inputs: Sequence[Path]) -> tuple[list[tuple[Path, bool]], dict[str, Any]]:
    """Return the files of documents, and whether each holds one per line; what was passed over."""
    files: list[tuple[Path, bool]] = []
    passed_over: dict[str, Any] = {}
    for path in inputs:
        if path.is_dir():
            tree = walk_suffix(path, ".txt")
            if not tree.files:
                raise ValueError(f"{path}: no *.txt in it; passed over: {tree.account()}")
            files += [(path / entry, False) for entry in tree.files]
            if tree.passed_over:
                passed_over[str(path)] = tree.account()
        elif path.suffix in (".txt", ".jsonl"):
            files.append((path, True))
        else:
            raise ValueError(f"{path}: must be a folder, or end in .txt or .jsonl")
    return files, passed_over


def _documents(files: Sequence[tuple[Path, bool]]) -> np.ndarray:
    """Return (n, 4) int64: number of the file, first byte, bytes, and line number, 0 for files."""
    places = []
    for number, (path, lines) in enumerate(files):
        if not lines:
            places.append((number, 0, path.stat().st_size, 0))
            continue
        begin = 0
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.strip():
                    places.append((number, begin, len(line), count))
                begin += len(line)
    return np.array(places, np.int64).reshape(-1, 4)


def _texts(
    files: Sequence[tuple[Path, bool]],
    documents: Sequence[Sequence[int]],
    text_field: str,
    left_out: list[str],
) -> Iterator[str]:
    """Yield the texts of documents; those that are none go into `left_out`."""
    for number, begin, size, line in documents:
        path = files[number][0]
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(size)
        try:
            text = decoded(data)
            if path.suffix == ".jsonl":
                text = parsed_json(text)[text_field]
                if not isinstance(text, str):
                    raise ValueError(f"{text_field!r} is {type(text).__name__}, not a text")
                text.encode()
        except (ValueError, KeyError, TypeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            left_out.append(f"{path}{f', line {line}' if line else ''}: {what}")
            continue
        yield text.strip() if line else text
