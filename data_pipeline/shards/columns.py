"""Columns of a shard: what an index finds in its samples, and how it is asked for.

Stated by the samples, and part of the index's digest: numbers at the top of the json member, `cls`,
and `NAME.count`, the length of a list. Derived from the same bytes, with a digest of their own, so
that an index can be made again by newer rules and still be the index of its shard:

    NAME                  true and false as 1 and 0
    NAME.INNER            numbers, truth values and lists (`.count`) inside of objects
    NAME.characters       length of a text; also `txt.characters`, of the txt member
    NAME.words            its words, between white space
    NAME.words.min, .max  of a list of texts the shortest and the longest; `.characters` likewise

Lengths are those with white space folded, as captions are read. Conditions and statistics also see
`bytes:EXTENSION`, the size of that member in bytes.

Texts of the json member of which a shard has few are columns of texts: licences, classes, names of
sources. Every data set has two more: `key`, and `shard`, the file name of the shard.
"""

import json
from array import array

import numpy as np

from data_pipeline.plain_text import decoded
from data_pipeline.shards.index import (
    MAX_COLUMNS,
    MAX_TEXTS,
    DerivedColumns,
    ShardIndex,
    TextColumn,
)

MISSING_TEXT = "\uffff"
"""Stands for the text that a sample lacks; no character, by the rules of Unicode."""

BYTES_PREFIX = "bytes:"
SOURCES = ("json", "cls", "txt")
"""Members in which columns are found."""

MAX_CHARACTERS = 100
"""Longest text that a column of texts holds."""

# Objects inside of objects: deeper ones are no records of numbers.
_MAX_DEPTH = 4


def column_names(index: ShardIndex) -> set[str]:
    """Names of all numeric columns of a shard."""
    sizes = (BYTES_PREFIX + extension for extension in index.extensions)
    return {*index.columns, *(index.derived.columns if index.derived else ()), *sizes}


def column_of(index: ShardIndex, name: str) -> np.ndarray | None:
    """A numeric column of a shard, None if it has no such column.

    Returns:
        (N,) int64, or float64 with NaN where a sample lacks the number or the member.
    """
    extension = name.removeprefix(BYTES_PREFIX)
    if extension != name and extension in index.extensions:
        return _member_bytes(index, extension)
    stated = index.columns.get(name)
    derived = index.derived.columns.get(name) if index.derived else None
    if derived is not None and derived.dtype.kind == "u":
        derived = derived.astype(np.int64)
    if stated is None:
        return derived
    if derived is None or stated.dtype.kind == "i":  # which no sample lacks
        return stated
    # A number in some samples, and true, false or part of an object in others.
    return np.where(np.isnan(stated), derived, stated)


def text_names(index: ShardIndex) -> set[str]:
    """Names of all columns of texts that the samples of a shard have, also of too many texts."""
    return set(index.derived.texts) if index.derived else set()


def texts_of(index: ShardIndex, name: str) -> np.ndarray | None:
    """A column of texts of a shard, None if it has no such column.

    Returns:
        (N,) str, MISSING_TEXT where a sample lacks it.

    Raises:
        ValueError: its texts are too many or too long to be held.
    """
    if name not in text_names(index):
        return None
    column = index.derived.texts[name]
    if column is None:
        raise ValueError(
            f"{name!r} has more than {MAX_TEXTS} different texts, or one of more than "
            f"{MAX_CHARACTERS} characters"
        )
    return np.array([MISSING_TEXT, *column.texts])[column.codes]


def _member_bytes(index: ShardIndex, extension: str) -> np.ndarray:
    arrays = index.arrays
    members = np.flatnonzero(arrays["member_extension"] == index.extensions.index(extension))
    sizes = arrays["member_size"][members].astype(np.int64)
    if len(members) == len(index):
        return sizes
    found = np.full(len(index), np.nan)
    rows = np.searchsorted(arrays["member_end"], members.astype(np.uint64), side="right")
    found[rows] = sizes
    return found


class ColumnBuilder:
    """Collects the columns of a shard while its samples pass by, in order."""

    def __init__(self) -> None:
        self._stated, self._derived = _SparseColumns(), _SparseColumns()
        self._texts = _SparseTexts()

    def add(self, row: int, extension: str, payload: bytes) -> None:
        """Take what a member of `SOURCES` says; what cannot be read says nothing."""
        if extension == "txt":
            self._text_lengths("txt", row, payload.decode("utf-8-sig", "replace"))
            return
        try:
            content = json.loads(decoded(payload))
        except (ValueError, RecursionError):
            return  # members of other people need not be valid; an index is no place to judge
        if extension == "cls":
            content = {"cls": content}
        if isinstance(content, dict):
            for name, value in content.items():
                self._field(name, row, value, 1)

    def finish(self, samples: int) -> tuple[dict[str, np.ndarray], int, DerivedColumns]:
        """Stated columns, (samples,) int64 or float64 each; how many were too many; the others."""
        stated = {name: self._stated.column(name, samples) for name in self._stated.names()}
        derived = {
            name: _narrow(self._derived.column(name, samples)) for name in self._derived.names()
        }
        dropped = len(self._stated.dropped)
        dropped_derived = len(self._derived.dropped | self._texts.dropped)
        texts = self._texts.columns(samples)
        return stated, dropped, DerivedColumns(derived, dropped_derived, texts)

    def _field(self, name: str, row: int, value: object, depth: int) -> None:
        numbers = self._stated if depth == 1 else self._derived
        match value:
            case bool():
                self._derived.add(name, row, int(value))
            case int() | float():
                numbers.add(name, row, value)
            case str():
                self._text_lengths(name, row, value)
                self._texts.add(name, row, value)
            case list():
                numbers.add(f"{name}.count", row, len(value))
                if value and all(isinstance(text, str) for text in value):
                    self._list_lengths(name, row, value)
            case dict() if depth < _MAX_DEPTH:
                for inner, part in value.items():
                    self._field(f"{name}.{inner}", row, part, depth + 1)

    def _text_lengths(self, name: str, row: int, text: str) -> None:
        for unit, length in _lengths(text).items():
            self._derived.add(f"{name}.{unit}", row, length)

    def _list_lengths(self, name: str, row: int, texts: list[str]) -> None:
        lengths = [_lengths(text) for text in texts]
        for unit in lengths[0]:
            of_unit = [length[unit] for length in lengths]
            self._derived.add(f"{name}.{unit}.min", row, min(of_unit))
            self._derived.add(f"{name}.{unit}.max", row, max(of_unit))


class _SparseColumns:
    """Numbers of the rows that have them."""

    def __init__(self) -> None:
        self._rows: dict[str, array] = {}
        self._values: dict[str, list[int | float]] = {}
        self.dropped: set[str] = set()

    def add(self, name: str, row: int, value: int | float) -> None:
        if name not in self._rows:
            if not _is_unicode(name):
                return
            if len(self._rows) == MAX_COLUMNS:
                self.dropped.add(name)
                return
            self._rows[name], self._values[name] = array("Q"), []
        rows = self._rows[name]
        if not rows or rows[-1] != row:  # `cls` may also be a field of the json member
            rows.append(row)
            self._values[name].append(value)

    def names(self) -> list[str]:
        return sorted(self._rows)

    def column(self, name: str, samples: int) -> np.ndarray:
        values = self._values[name]
        whole = all(isinstance(v, int) and -(2**63) <= v < 2**63 for v in values)
        if whole and len(values) == samples:
            return np.array(values, np.int64)
        column = np.full(samples, np.nan)
        column[self._rows[name]] = [_as_float(value) for value in values]
        return column


class _SparseTexts:
    """Texts of the rows that have them, as long as they are short and few."""

    def __init__(self) -> None:
        self._rows: dict[str, array] = {}
        self._codes: dict[str, array] = {}
        self._numbers: dict[str, dict[str, int] | None] = {}
        self.dropped: set[str] = set()

    def add(self, name: str, row: int, text: str) -> None:
        if name not in self._numbers:
            if not _is_unicode(name):
                return
            if len(self._numbers) == MAX_COLUMNS:
                self.dropped.add(name)
                return
            self._numbers[name], self._rows[name], self._codes[name] = {}, array("Q"), array("B")
        numbers = self._numbers[name]
        if numbers is None or (self._rows[name] and self._rows[name][-1] == row):
            return
        full = len(numbers) == MAX_TEXTS and text not in numbers
        if full or len(text) > MAX_CHARACTERS or not _is_unicode(text):
            self._numbers[name] = None
            del self._rows[name], self._codes[name]
            return
        self._rows[name].append(row)
        self._codes[name].append(numbers.setdefault(text, len(numbers) + 1))

    def columns(self, samples: int) -> dict[str, TextColumn | None]:
        found: dict[str, TextColumn | None] = {}
        for name, numbers in sorted(self._numbers.items()):
            found[name] = None
            if numbers is not None:
                codes = np.zeros(samples, np.uint8)
                codes[self._rows[name]] = self._codes[name]
                found[name] = TextColumn(codes, tuple(numbers))
        return found


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it; JSON can spell half a character."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _lengths(text: str) -> dict[str, int]:
    words = text.split()
    return {"characters": sum(map(len, words)) + max(len(words) - 1, 0), "words": len(words)}


def _narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest of uint8, uint32 and int64 that holds them."""
    if values.dtype == np.int64 and len(values) and values.min() >= 0:
        for dtype in (np.uint8, np.uint32):
            if values.max() <= np.iinfo(dtype).max:
                return values.astype(dtype)
    return values


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON integers have no limit
        return float("inf") if value > 0 else float("-inf")
