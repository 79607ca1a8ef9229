"""Which samples of a data set meet a condition: evaluated once, when the plan of a run is built.

All indices are read for that, in parallel; the answer is kept under $OMNIPRETRAIN_CACHE, by the
fingerprint of the data and the text of the condition, and mapped from there by every process.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator
from rich.console import Console
from rich.progress import track

from data_pipeline.files import cache_folder, exclusive, using_cache
from data_pipeline.filters.expressions import (
    TEXT_COLUMNS,
    Expression,
    ExpressionError,
    UnknownColumn,
)
from data_pipeline.filters.selection import Selection
from data_pipeline.shards.columns import MISSING_TEXT, column_names, column_of, text_names, texts_of
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.shard_set import Shard, ShardSet
from data_pipeline.storage.errors import ShardError

RULES = "1"
"""Part of the names of cached answers; to be raised when conditions come to mean something else."""

_THREADS = 16
# With fewer shards a progress bar would be gone before it can be read.
_SHARDS_OF_A_BAR = 200

_log = logging.getLogger("omnipretrain.data")


def _checked(text: str) -> str:
    Expression(text)
    return text


Condition = Annotated[str, AfterValidator(_checked)]
"""Type of a setting that holds a condition; a faulty one is found when the recipe is read."""


def select_rows(shards: ShardSet, where: str) -> Selection:
    """Rows of `shards` that meet the condition `where`.

    Raises:
        ExpressionError: no condition, a column that no shard has, or no sample meets it.
        ShardError: an index is damaged.
        OSError: an index cannot be read.
    """
    selection = _cached(shards, Expression(where))
    if not selection.n_kept:
        raise ExpressionError(f"condition `{where}`: none of the {len(shards)} samples meets it")
    return selection


def _cached(shards: ShardSet, expression: Expression) -> Selection:
    key = sha256(f"{RULES}\0{shards.fingerprint}\0{expression.text}".encode()).hexdigest()[:32]
    place = cache_folder() / "selections" / f"{key}.kept"
    if (found := _stored(place, shards)) is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            with using_cache():
                place.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(place))
        except OSError as error:
            _log.warning("which samples meet a condition is not kept for the next start: %s", error)
            return _evaluate(shards, expression)
        if (found := _stored(place, shards)) is not None:
            return found  # another process evaluated it while this one waited
        selection = _evaluate(shards, expression)
        try:
            with using_cache():
                selection.save(place)
        except OSError as error:
            _log.warning("which samples meet a condition is not kept for the next start: %s", error)
            return selection
        return Selection.load(place)


def _stored(place: Path, shards: ShardSet) -> Selection | None:
    try:
        selection = Selection.load(place)
    except FileNotFoundError:
        return None
    except (ShardError, OSError) as error:
        _log.warning("%s; evaluating the condition again", error)
        return None
    return selection if selection.n_rows == len(shards) else None


def _evaluate(shards: ShardSet, expression: Expression) -> Selection:
    seen = _SeenColumns()

    def mask(number: int) -> np.ndarray:
        index, shard = shards.read_index(number), shards.shards[number]
        seen.add(index, shard)
        return expression(lambda name: _column(expression, name, index, shard), len(index))

    _log.info("reading the indices of %d shards for `%s`", len(shards.shards), expression.text)
    with contextlib.closing(_in_parallel(mask, len(shards.shards))) as masks:
        bar = track(
            masks,
            f"where {expression.text[:40]}",
            total=len(shards.shards),
            transient=True,
            console=Console(stderr=True),
            disable=len(shards.shards) < _SHARDS_OF_A_BAR,
        )
        selection = Selection.gather(len(shards), bar)
    seen.check(expression)
    return selection


def _column(expression: Expression, name: str, index: ShardIndex, shard: Shard) -> np.ndarray:
    """A column of a shard as the expression takes it; all missing where the shard lacks it."""
    if name == "shard":
        return np.array(shard.name)
    if name == "key":
        return np.array(index.keys(), str)
    found = column_of(index, name) if name not in expression.texts else None
    if found is not None or name in expression.numbers:
        return np.full(len(index), np.nan) if found is None else found
    try:
        texts = texts_of(index, name)
    except ValueError as error:
        raise ExpressionError(f"condition `{expression.text}`: {shard.label}: {error}") from None
    return np.full(len(index), MISSING_TEXT) if texts is None else texts


class _SeenColumns:
    """Which columns the shards have, to tell a mistake from a number that samples lack."""

    def __init__(self) -> None:
        self._numbers: set[str] = set()
        self._texts: set[str] = set()
        self._newer: set[str] = set()
        self._outdated: list[str] = []

    def add(self, index: ShardIndex, shard: Shard) -> None:
        """Note the columns of a shard; several threads may."""
        self._numbers.update(column_names(index))
        self._texts.update(text_names(index))
        if index.derived is None:
            self._outdated.append(shard.label)
        else:
            self._newer.update(index.derived.columns, index.derived.texts)

    def check(self, expression: Expression) -> None:
        """Refuse columns that no shard has, or not of that type, and those that old indices lack
        though the samples may not."""
        hint = ""
        if self._outdated:
            hint = (
                f" (the indices of {len(self._outdated)} shard(s), {min(self._outdated)} among "
                "them, are from before there were nested numbers, truth values, texts and their "
                "lengths: `python -m tools.shards index --force` writes them again)"
            )
        try:
            expression.check_columns(self._numbers | self._texts)
        except UnknownColumn as error:
            raise UnknownColumn(f"{error}{hint}") from None
        start = f"condition `{expression.text}`"
        if wrong := sorted((expression.numbers & self._texts) - self._numbers):
            raise ExpressionError(f"{start}: {wrong[0]!r} is a column of texts, not of numbers")
        if wrong := sorted(expression.texts - self._texts - {*TEXT_COLUMNS}):
            raise ExpressionError(f"{start}: {wrong[0]!r} is a column of numbers, not of texts")
        if self._outdated and (lacking := sorted(self._newer & expression.columns.keys())):
            raise ExpressionError(f"{start}: not every shard has {', '.join(lacking)}{hint}")


def _in_parallel(function, count: int) -> Iterator[np.ndarray]:
    """function(0), function(1), ... in order; the first error ends it."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        yield from pool.map(function, range(count))
    finally:
        pool.shutdown(cancel_futures=True)
