"""Text for whoever reads a tool's output."""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any


def write_utf8() -> None:
    """Have the standard output written in UTF-8 whatever the locale, as Python does from 3.15 on.

    Where the locale is another, a plus-minus sign or a caption would end the program with an
    UnicodeEncodeError, and YAML that is sent to a file could not be read back. What UTF-8 has no
    bytes for (names of files that are none) is written as its escape. Streams that others have put
    in the place of the standard output (notebooks) are left alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def parse_in_any_order(
    parser: argparse.ArgumentParser, actions: Any, argv: Sequence[str] | None
) -> argparse.Namespace:
    """`parser.parse_args(argv)`, with the words and options of a command in any order.

    argparse intermixes them in a parser without commands only, so that of the command is asked.
    actions: what `parser.add_subparsers` has returned.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    chosen = actions.choices.get(words[0]) if words else None
    if chosen is None:
        return parser.parse_args(words)
    return chosen.parse_intermixed_args(words[1:])
