"""Text for whoever reads a tool's output."""

import io
import sys


def write_utf8() -> None:
    """Have the standard output written in UTF-8 whatever the locale, as Python does from 3.15 on.

    Where the locale is another, a plus-minus sign or a caption would end the program with an
    UnicodeEncodeError, and YAML that is sent to a file could not be read back. What UTF-8 has no
    bytes for (names of files that are none) is written as its escape. Streams that others have put
    in the place of the standard output (notebooks) are left alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
