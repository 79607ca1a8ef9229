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

from data_pipeline.columns import column_names, column_of
from data_pipeline.expressions import Expression, ExpressionError, UnknownColumn
from data_pipeline.files import cache_folder, exclusive
from data_pipeline.selection import Selection
from data_pipeline.shards import ShardSet
from data_pipeline.tar_headers import ShardError

RULES = "1"
"""Part of the names of cached answers; to be raised when conditions come to mean something else."""

_THREADS = 16
# With fewer shards a progress bar would be gone before it can be read.
_SHARDS_OF_A_BAR = 200

_log = logging.getLogger(__name__)


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
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(place))
        except OSError as error:
            _log.warning("which samples meet a condition is not kept for the next start: %s", error)
            return _evaluate(shards, expression)
        if (found := _stored(place, shards)) is not None:
            return found  # another process evaluated it while this one waited
        selection = _evaluate(shards, expression)
        try:
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
    known: set[str] = set()
    derived: set[str] = set()
    outdated: list[str] = []

    def mask(number: int) -> np.ndarray:
        index = shards.read_index(number)
        known.update(column_names(index))
        shard = shards.shards[number]
        if index.derived is None:
            outdated.append(shard.label)
        else:
            derived.update(index.derived.columns)

        def column(name: str) -> np.ndarray:
            if name == "shard":
                return np.array(shard.name)
            if name == "key":
                return np.array(index.keys(), str)
            found = column_of(index, name)
            return np.full(len(index), np.nan) if found is None else found

        return expression(column, len(index))

    _log.info("reading the indices of %d shards for `%s`", len(shards.shards), expression.text)
    with contextlib.closing(_in_parallel(mask, len(shards.shards))) as masks:
        bar = track(
            masks, f"where {expression.text[:40]}", total=len(shards.shards), transient=True,
            console=Console(stderr=True), disable=len(shards.shards) < _SHARDS_OF_A_BAR,
        )  # fmt: skip
        selection = Selection.gather(len(shards), bar)
    _check_columns(expression, known, derived, outdated)
    return selection


def _check_columns(
    expression: Expression, known: set[str], derived: set[str], outdated: list[str]
) -> None:
    """Refuse columns that no shard has, and those that old indices lack though the samples may not.

    Args:
        known: columns of any shard.
        derived: those of them that newer indices have only.
        outdated: shards with an older index.
    """
    hint = ""
    if outdated:
        hint = (
            f" (the indices of {len(outdated)} shard(s), {min(outdated)} among them, are from "
            "before there were nested numbers, truth values and lengths of texts: `python -m "
            "tools.shards index --force` writes them again)"
        )
    try:
        expression.check_columns(known)
    except UnknownColumn as error:
        raise UnknownColumn(f"{error}{hint}") from None
    if outdated and (lacking := sorted(derived & expression.columns.keys())):
        raise ExpressionError(
            f"condition `{expression.text}`: not every shard has {', '.join(lacking)}{hint}"
        )


def _in_parallel(function, count: int) -> Iterator[np.ndarray]:
    """function(0), function(1), ... in order; the first error ends it."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        yield from pool.map(function, range(count))
    finally:
        pool.shutdown(cancel_futures=True)
