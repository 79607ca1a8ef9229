"""Conditions on the columns of an index: `width >= 256 and captions.count > 0`.

Python's grammar, of which a part is allowed, evaluated on whole columns; nothing is executed.

    numbers and texts    3, 0.5, 1e6, "abc"; True and False are 1 and 0
    columns              width, captions.count, bytes:jpg; column("any name") for all others;
                         texts are those that are compared with texts: licence == "CC BY"
    arithmetic           + - * / % in float64 (whole numbers are exact up to 2**53)
    comparisons          < <= == != >= >, chains as 1 < width / height < 2
    membership           label in [1, 2, 3], key not in ["a", "b"]; "part" in key
    conditions           and, or, not, parentheses
    functions            min(a, b, ...), max(a, b, ...), abs(a), missing(column)

A number or text that a sample lacks is missing, and so is the result of arithmetic with it, and of
a division by zero. Every comparison with what is missing is false, `!=` and `not in` included;
`not` turns that into true like any other false. `missing(column)` asks.
"""

import ast
import itertools
import keyword
import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

import numpy as np

from data_pipeline.filters.expression_values import Columns, Evaluation

TEXT_COLUMNS = ("key", "shard")
"""Columns of texts, which every data set has."""

MAX_CHARACTERS = 100_000

# Words that have no meaning in expressions: here they are names, as `class` of an image folder.
_NAMES = sorted(
    {*keyword.kwlist}
    - {"and", "or", "not", "in", "is", "if", "else", "for", "lambda", "True", "False", "None"}
)

# Strings, or what Python's grammar reads in another way than this one. The first alternative wins.
_SPECIAL = re.compile(
    r"'[^'\\\n]*'|\"[^\"\\\n]*\"|(?<=\w):(?=\w)|(?<![<>=!])=(?!=)|[#\n\r\t\\]"
    rf"|\b(?:{'|'.join(_NAMES)})\b"
)


class ExpressionError(ValueError):
    """The expression cannot be used; the message quotes it and names the place."""


class UnknownColumn(ExpressionError):
    """The expression names a column that the data do not have."""


class Expression:
    """A parsed condition.

    Attributes:
        text: as it was written.
        columns: name -> the character where it is named first, from 1.
        texts: names of columns that must hold texts.
        numbers: names of columns that must hold numbers. `missing` takes either.
    """

    def __init__(self, text: str) -> None:
        """Parse. Raises ExpressionError also for texts where numbers should be and the like."""
        self.text = text
        self.columns: dict[str, int] = {}
        self._root = self._parse()
        try:
            nodes = self._nodes()
            self.texts = self._compared_with_texts(nodes)
            asked = {id(node.args[0]) for node in nodes if _asks(node)}
            used = {self.column_of(node) for node in nodes if id(node) not in asked} - {None}
            self.numbers = used - self.texts
            # Types do not depend on values: none are needed to check them.
            types = {name: str if name in self.texts else float for name in self.columns}
            self(lambda name: np.empty(0, types[name]), 0)
        except RecursionError:
            raise self._error(None, "is nested too deep") from None

    def __call__(self, columns: Columns, count: int) -> np.ndarray:
        """Which samples meet the condition.

        Args:
            columns: gives a column by name, (count,).
            count: samples.

        Returns:
            (count,) bool.

        Raises:
            ExpressionError: numbers are compared with texts, or what is computed is no condition.
            KeyError: from `columns`.
        """
        with np.errstate(all="ignore"):  # missing numbers and overflow to infinity are no faults
            found = Evaluation(columns, self.column_of, self._error).condition(self._root)
        return np.broadcast_to(found, (count,)).copy()

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def check_columns(self, known: Iterable[str]) -> None:
        """Raise UnknownColumn for the first column that is not among the `known` names."""
        known = {*known, *TEXT_COLUMNS}
        for name, place in self.columns.items():
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                what = f"unknown column {name!r}; {hint}There are {_listed(known)}"
                raise UnknownColumn(self._message(place, what))

    # ---- parsing -------------------------------------------------------------------------------

    def _parse(self) -> ast.expr:
        if len(self.text) > MAX_CHARACTERS:
            raise ExpressionError(f"a condition of more than {MAX_CHARACTERS} characters")
        # Of equal length, so that places in it are places in the text.
        plain = _SPECIAL.sub(self._plain, self.text)
        lead = len(plain) - len(plain.lstrip())
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd but valid Python: "1and 2"
                root = ast.parse(plain[lead:], mode="eval").body
        except SyntaxError as error:
            place = None if error.offset is None else lead + error.offset
            raise ExpressionError(self._message(place, error.msg)) from None
        except ValueError as error:
            raise self._error(None, f"cannot be read: {error}") from None
        except (RecursionError, MemoryError):
            raise self._error(None, "is nested too deep") from None
        self._lead, self._bytes = lead, self.text[lead:].encode()
        return root

    def _plain(self, match: re.Match[str]) -> str:
        found = match[0]
        if found in _NAMES:
            return found.capitalize()  # to be parsed; `column_of` reads it as it is written
        if len(found) > 1:
            return found
        if found == ":":
            return "."
        if found == "=":
            raise ExpressionError(self._message(match.start() + 1, "to compare, write =="))
        if found in "#\\":
            raise ExpressionError(self._message(match.start() + 1, f"unexpected {found!r}"))
        return " "

    def _nodes(self) -> list[ast.AST]:
        """All parts in the order of the text, but for names of functions; notes the columns."""
        found: list[ast.AST] = []
        pending: list[ast.AST] = [self._root]
        while pending:
            node = pending.pop()
            found.append(node)
            name = self.column_of(node)
            if name is not None:
                self.columns.setdefault(name, self._place(node))
            elif isinstance(node, ast.Call):
                pending += reversed(node.args)
            else:
                pending += reversed([*ast.iter_child_nodes(node)])
        return found

    def _compared_with_texts(self, nodes: list[ast.AST]) -> set[str]:
        """Columns that stand beside a text in a comparison, or beside another such column."""
        texts = self.columns.keys() & set(TEXT_COLUMNS)
        pairs = [
            pair
            for node in nodes
            if isinstance(node, ast.Compare)
            for pair in itertools.pairwise([node.left, *node.comparators])
        ]
        pairs += [(other, one) for one, other in pairs]
        before = -1
        while before != len(texts):
            before = len(texts)
            texts |= {
                name
                for one, other in pairs
                if (name := self.column_of(one)) is not None
                if self.column_of(other) in texts or _has_text(other)
            }
        return texts

    def column_of(self, node: ast.AST) -> str | None:
        """Name of the column that a node stands for, None if it stands for something else."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = node.args
            if node.func.id == "column" and len(arguments) == 1 and not node.keywords:
                value = arguments[0]
                return value.value if _is_text(value) else None
            return None
        parts = node
        while isinstance(parts, ast.Attribute):
            parts = parts.value
        if not isinstance(parts, ast.Name):
            return None
        # As it is written: parsing has replaced colons, and normalised letters.
        written = self._bytes[node.col_offset : node.end_col_offset].decode()
        return re.sub(r"\s", "", written)

    # ---- messages ------------------------------------------------------------------------------

    def _place(self, node: ast.AST) -> int:
        return self._lead + len(self._bytes[: node.col_offset].decode()) + 1

    def _error(self, node: ast.AST | None, what: str) -> ExpressionError:
        return ExpressionError(self._message(None if node is None else self._place(node), what))

    def _message(self, place: int | None, what: str) -> str:
        where = "" if place is None else f"character {place}: "
        shown = self.text if len(self.text) <= 200 else self.text[:197] + "..."
        return f"condition `{shown}`: {where}{what}"


def _asks(node: ast.AST) -> bool:
    """Whether it is a call of `missing`."""
    name = getattr(getattr(node, "func", None), "id", None)
    return name == "missing" and len(node.args) == 1


def _has_text(node: ast.AST) -> bool:
    """Whether it is a text, or a list with one."""
    return _is_text(node) or any(map(_is_text, getattr(node, "elts", ())))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _listed(names: Iterable[str]) -> str:
    """Names for a message; the first hundred of them."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 100} more" if len(ordered) > 100 else ""
    return ", ".join(ordered[:100]) + rest
