"""Types of command-line arguments that several tools share."""

import argparse


def positive(text: str) -> int:
    """Parse a count."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a number that may be 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
    return int(text)
