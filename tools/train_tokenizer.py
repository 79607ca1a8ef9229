"""Train a byte-level BPE tokenizer on captions.

    python -m tools.train_tokenizer runs/tokenizer --shards data/train --vocab-size 8192
    python -m tools.train_tokenizer runs/tokenizer --text captions.txt

Writes a folder that recipes name as `tokenizer.path` and that transformers can load. The same
captions and options give the same bytes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.console import parse_in_any_order
from data_pipeline.plain_text import read_lines

# What reads shards and trains is imported by the functions that do: `--help` needs none of it.


def captions_of_shards(
    specs: list[str],
    sources: Sequence[str],
    max_samples: int | None = None,
    where: str | None = None,
) -> Iterator[str]:
    """Captions of all samples, or of `max_samples` spread evenly; damaged ones are left out.

    Args:
        sources: where captions are; those of all sources of a sample are taken.
        where: only samples that meet this condition.

    Raises:
        ValueError: not a single sample has a caption, or the condition is faulty.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from data_pipeline.order.sources import open_source
    from data_pipeline.reading.reader import BadSample, SampleReader
    from data_pipeline.samples.caption_texts import CaptionSourceSettings, CaptionTexts

    console = Console(stderr=True)
    captions = CaptionTexts([CaptionSourceSettings(source=source) for source in sources])
    data = open_source(specs, where)
    count = min(data.samples, max_samples or data.samples)
    rows = np.arange(count) * data.samples // count
    rows = rows if data.selection is None else data.selection.select(rows)
    faults: list[BadSample] = []
    with SampleReader(data.shards) as reader:
        for row in track(rows.tolist(), "reading captions", console=console):
            try:
                sample = reader.read(row, captions.extensions)
                yield from captions.every(sample)
            except BadSample as fault:
                faults.append(fault)
    if len(faults) == count:
        raise ValueError(
            f"no sample has a caption; first: {faults[0]}. --caption-source says where captions "
            "are, for example json:captions"
        )
    if faults:
        text = f"left out {len(faults)} of {count} samples; first: {faults[0]}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def lines_of_files(paths: Sequence[Path]) -> Iterator[str]:
    """Non-empty lines of UTF-8 text files.

    Raises:
        ValueError: a file is not UTF-8 (file and line are named), or there is not a single line.
    """
    empty = True
    for path in paths:
        for line in filter(None, map(str.strip, read_lines(path, newline=None))):
            empty = False
            yield line
    if empty:
        raise ValueError(f"no captions in {', '.join(map(str, paths))}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the tokenizer is written")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--shards", nargs="+", help="folders, tars, globs or brace patterns")
    given.add_argument("--text", nargs="+", type=Path, help="text files, one caption a line")
    parser.add_argument(
        "--caption-source",
        nargs="+",
        default=["txt"],
        metavar="SOURCE",
        type=_source,
        help="as in recipes: txt or json:KEY; of several, all that a sample has",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help='only samples that meet it, as in recipes: "width >= 256"',
    )
    parser.add_argument("--max-samples", type=int, help="read only so many samples of the shards")
    parser.add_argument("--vocab-size", type=int, default=8192, help="entries, 259 at least")
    parser.add_argument("--min-frequency", type=int, default=2, help="rarer pairs stay apart")
    parser.add_argument("--lowercase", action="store_true", help="fold case")
    return run(parse_in_any_order(parser, arguments))


def run(options: argparse.Namespace) -> int:
    """Train as the command line says; returns the exit status."""
    from rich.console import Console

    from data_pipeline.reading.reader import TransientReadError
    from data_pipeline.samples.tokenizer import train_byte_level_bpe

    console = Console(stderr=True)
    if options.text:
        texts = lines_of_files(options.text)
    else:
        texts = captions_of_shards(
            options.shards, options.caption_source, options.max_samples, options.where
        )
    try:
        tokenizer = train_byte_level_bpe(
            texts, options.vocab_size, options.min_frequency, options.lowercase
        )
        tokenizer.save(options.folder)
    except (TransientReadError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(
        f"{options.folder}: {tokenizer.vocab_size} tokens, digest {tokenizer.digest[:16]}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _source(text: str) -> str:
    from data_pipeline.samples.members import check_source

    try:
        return check_source("source", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
