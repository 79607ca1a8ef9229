"""Text for whoever reads a tool's output."""

import argparse
import io
import sys
from collections.abc import Sequence


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
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """`parser.parse_args(arguments)`, with words and options in any order.

    `check RECIPE --world 2 steps=5`: argparse itself would refuse a word behind the option. It
    intermixes them in a parser without commands only, so that the one of the command is asked.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not commands:
        rest = [a for a in parser._actions if a.nargs in ("+", argparse.REMAINDER)]
        if "--" in words and rest:  # a command with options of its own
            return parser.parse_args(words)
        return parser.parse_intermixed_args(words)
    chosen = commands[0].choices.get(words[0]) if words else None
    if chosen is None:
        return parser.parse_args(words)
    found = parse_in_any_order(chosen, words[1:])
    if commands[0].dest != argparse.SUPPRESS:
        setattr(found, commands[0].dest, words[0])
    return found
