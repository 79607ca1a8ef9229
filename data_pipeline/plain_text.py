"""Text and JSON that other people wrote, and the JSON that we write: one rule for each.

Text is UTF-8. A byte order mark at its beginning, which editors and spreadsheets put there, is no
part of it. JSON has no word for NaN and infinity: they are read and written as null.
"""

import codecs
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MARK = "\ufeff"
"""The byte order mark, as a character."""
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(data: bytes, place: str = "") -> str:
    """Return bytes as text, without a byte order mark.

    Errors: ValueError naming `place`, the line and the byte if it is not UTF-8.
    """
    try:
        return data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte {data[error.start]:#04x} is not UTF-8"
        for mark, name in _OTHER_MARKS.items():
            if data.startswith(mark):
                what = f"it is {name}, not UTF-8: save it as UTF-8"
                break
        raise ValueError(f"{place}{', ' if place else ''}line {line}: {what}") from None


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a small file. Errors: OSError; ValueError as `decoded`."""
    return decoded(Path(path).read_bytes(), os.fspath(path))


def read_lines(path: str | os.PathLike[str], newline: str | None = "\n") -> Iterator[str]:
    """Yield the lines of a file of any size, with their ends.

    Args: newline: as that of `open`; by default lines end at line feeds only.
    Errors: OSError; ValueError naming file and line if it is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", newline=newline) as file:
        try:
            yield from file
        except UnicodeDecodeError:
            _name_bad_line(path)
            raise


def _name_bad_line(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                decoded(line)
            except ValueError as error:
                what = str(error).split(": ", 1)[1]
                raise ValueError(f"{os.fspath(path)}, line {number}: {what}") from None


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the class names of a file, one a line, in the order of their labels.

    White space around a name is no part of it, and empty lines are no names.

    Errors: OSError; ValueError if there is none, or one stands there twice.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name = line.strip()
        if name in names:
            raise ValueError(f"{path}, line {number}: {name!r} is the class of line {names[name]}")
        if name:
            names[name] = number
    if not names:
        raise ValueError(f"{path}: has no class names, one a line")
    return list(names)


def parsed_json(text: str | bytes, place: str = "") -> Any:
    """Return the value of a JSON text, with null in the place of NaN and infinities.

    Errors: ValueError naming `place`; RecursionError never.
    """
    try:
        if isinstance(text, bytes):
            text = decoded(text)
        return json.loads(text, parse_float=_finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error}" if place else str(error)) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value of a JSON file, as `parsed_json`. Errors: OSError, ValueError."""
    return parsed_json(Path(path).read_bytes(), os.fspath(path))


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """Return the json member of a sample: UTF-8, and JSON to the letter."""
    try:
        text = _dumped(record)
    except ValueError:
        text = _dumped(without_infinities(record))
    if not is_utf8(text):  # half a surrogate pair, from a careless JSON file: keep it escaped
        text = _dumped(without_infinities(record), ascii_only=True)
    return text.encode()


def _dumped(record: Any, ascii_only: bool = False) -> str:
    return json.dumps(record, ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)


def without_infinities(value: Any) -> Any:
    """Return a value for JSON with None in the place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: without_infinities(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_utf8(text: str) -> bool:
    """Whether a text holds no surrogates, as which bytes that are not UTF-8 arrive."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
