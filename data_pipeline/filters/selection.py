"""Rows of a data set that take part: a bitmap that answers which row is the k-th kept one.

One bit a row, and a running count for every 1,024 of them: N / 8 bytes and 6 % more, so 133 MB for
10**9 rows. `select` and `rank` are exact inverses and both monotone: an order over kept rows that
reads neighbours one behind the other still does so in the shards.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.files import write_atomically
from data_pipeline.shards import array_file
from data_pipeline.storage.errors import ShardError

FORMAT = "omnipretrain.selection"
VERSION = "1"

_WORD_BITS, _BLOCK_WORDS = 64, 16
_BLOCK_ROWS = _WORD_BITS * _BLOCK_WORDS
_WORD = np.dtype("<u8")  # in this byte order the bytes of a word are in the order of its rows


class Selection:
    """Kept rows of a data set. Immutable; a copy for a worker process maps the same file.

    Attributes:
        n_rows: rows of the data set.
        n_kept: rows that take part.
    """

    def __init__(self, words: np.ndarray, n_rows: int) -> None:
        """Take a bitmap; see `gather` and `everything` for friendlier ways.

        Args:
            words: (16 * ceil(n_rows / 1024),) uint64; row r is bit r mod 64 of word r div 64, and
                bits from n_rows on are 0.
        """
        self.n_rows = n_rows
        self._blocks = np.asarray(words, _WORD).reshape(-1, _BLOCK_WORDS)
        if len(self._blocks) != -(-n_rows // _BLOCK_ROWS):
            raise ValueError(f"a bitmap of {len(words)} words does not belong to {n_rows} rows")
        # Kept rows before each block, and all of them at the end.
        self._before = np.zeros(len(self._blocks) + 1, np.int64)
        np.cumsum(np.bitwise_count(self._blocks).sum(1, dtype=np.int64), out=self._before[1:])
        self.n_kept = int(self._before[-1])
        self._path: str | None = None

    @classmethod
    def everything(cls, n_rows: int) -> Self:
        """All rows of a data set; where that is meant for good, None costs less."""
        words = np.zeros(-(-n_rows // _BLOCK_ROWS) * _BLOCK_WORDS, _WORD)
        whole, rest = divmod(n_rows, _WORD_BITS)
        words[:whole] = ~np.uint64(0)
        if rest:
            words[whole] = (1 << rest) - 1
        return cls(words, n_rows)

    @classmethod
    def gather(cls, n_rows: int, masks: Iterable[np.ndarray]) -> Self:
        """Rows whose mask is True.

        Args:
            masks: (n,) bool each, one behind the other in the order of rows; n_rows in all.
        """
        packed = np.zeros(-(-n_rows // _BLOCK_ROWS) * _BLOCK_ROWS // 8, np.uint8)
        begin = 0
        for mask in masks:
            if begin + len(mask) > n_rows:
                raise ValueError(f"more masks than the {n_rows} rows of the data set")
            # A mask may begin inside a byte, that of the mask before it.
            bits = np.packbits(np.concatenate([np.zeros(begin % 8, bool), mask]), bitorder="little")
            packed[begin // 8 : begin // 8 + len(bits)] |= bits
            begin += len(mask)
        if begin != n_rows:
            raise ValueError(f"masks of {begin} rows for a data set of {n_rows}")
        return cls(packed.view(_WORD), n_rows)

    def select(self, ranks: np.ndarray) -> np.ndarray:
        """Row of the k-th kept row, counted from 0.

        Evaluate many at once: the cost of a row is a search among n_rows / 1024 counts.

        Args:
            ranks: (n,) int64 in [0, n_kept), in any order.

        Returns:
            (n,) int64 rows.
        """
        ranks = np.asarray(ranks, np.int64)
        if ranks.size and not 0 <= ranks.min() <= ranks.max() < self.n_kept:
            raise IndexError(f"kept rows are 0 .. {self.n_kept - 1}, not {ranks.max()}")
        blocks = np.searchsorted(self._before, ranks, side="right") - 1
        words = self._blocks[blocks]
        word, left = _descend(np.bitwise_count(words), ranks - self._before[blocks])
        octets = words[np.arange(len(words)), word].view(np.uint8).reshape(-1, 8)
        octet, left = _descend(np.bitwise_count(octets), left)
        bits = np.unpackbits(octets[np.arange(len(octets)), octet, None], axis=1, bitorder="little")
        bit, _ = _descend(bits, left)
        return blocks * _BLOCK_ROWS + word * _WORD_BITS + octet * 8 + bit

    def rank(self, rows: np.ndarray) -> np.ndarray:
        """Kept rows before each row: of a kept row, the number that `select` takes.

        Args:
            rows: (n,) int64 in [0, n_rows), kept or not.

        Returns:
            (n,) int64.
        """
        blocks, word, bit = self._locate(rows)
        words = self._blocks[blocks]
        counts = np.bitwise_count(words).astype(np.int64)
        earlier = np.where(np.arange(_BLOCK_WORDS) < word[:, None], counts, 0).sum(1)
        own = words[np.arange(len(words)), word] & ((np.uint64(1) << bit) - np.uint64(1))
        return self._before[blocks] + earlier + np.bitwise_count(own)

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Whether rows are kept: (n,) int64 in [0, n_rows) -> (n,) bool."""
        blocks, word, bit = self._locate(rows)
        return (self._blocks[blocks, word] >> bit & np.uint64(1)).astype(bool)

    def without(self, rows: np.ndarray) -> Self:
        """This selection less some rows: (n,) int64 in [0, n_rows), kept or not."""
        blocks, word, bit = self._locate(rows)
        left = self._blocks.copy()
        np.bitwise_and.at(left, (blocks, word), ~(np.uint64(1) << bit))
        return type(self)(left.ravel(), self.n_rows)

    @cached_property
    def digest(self) -> str:
        """sha256 of which rows are kept."""
        found = sha256(f"{self.n_rows}\n".encode())
        found.update(np.ascontiguousarray(self._blocks).view(np.uint8).data)
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bitmap to `path`, atomically."""
        metadata = {"format": FORMAT, "version": VERSION, "rows": str(self.n_rows)}
        arrays = {"words": self._blocks.ravel().astype(np.uint64)}
        write_atomically(
            Path(path), array_file.serialise(metadata | {"digest": self.digest}, arrays)
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Map the bitmap at `path`; processes of a node share its memory.

        Raises:
            FileNotFoundError; ShardError if the file is damaged or of another kind.
        """
        try:
            metadata, arrays = array_file.load(path)
            if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {metadata['format']} version {metadata['version']}")
            selection = cls(arrays["words"], int(metadata["rows"]))
            if selection.digest != metadata["digest"]:
                raise ValueError("its digest does not match its content")
        except (ValueError, KeyError) as error:
            raise ShardError(
                f"{os.fspath(path)}: damaged list of kept rows ({error}): delete it"
            ) from None
        selection._path = os.path.abspath(path)
        return selection

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path if the bitmap is that of a file."""
        if self._path is not None:
            return type(self).load, (self._path,)
        return type(self), (self._blocks.ravel(), self.n_rows)

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Block, word in it and bit in that of each row."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.n_rows:
            raise IndexError(f"rows are 0 .. {self.n_rows - 1}, not {rows.min()} or {rows.max()}")
        blocks, inside = np.divmod(rows, _BLOCK_ROWS)
        word, bit = np.divmod(inside, _WORD_BITS)
        return blocks, word, bit.astype(np.uint64)


def _descend(counts: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of k parts holds the item with number `left`, and its number in that part.

    Args:
        counts: (n, k) items in each part.
        left: (n,) int64.
    """
    ends = np.cumsum(counts, axis=1, dtype=np.int64)
    part = (ends <= left[:, None]).sum(1)
    earlier = ends[np.arange(len(ends)), part] - counts[np.arange(len(ends)), part]
    return part, left - earlier
