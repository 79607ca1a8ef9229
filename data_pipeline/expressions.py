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
import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import numpy as np

Columns = Callable[[str], np.ndarray]
"""Name of a column -> (n,) numbers, NaN where missing, or texts, MISSING_TEXT where missing."""

TEXT_COLUMNS = ("key", "shard")
"""Columns of texts, which every data set has."""

MISSING_TEXT = "\uffff"
"""Stands for the text that a sample lacks; no character, by the rules of Unicode."""

MAX_CHARACTERS = 100_000

_ARITHMETIC = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply}
_COMPARISONS = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
    ast.GtE: np.greater_equal,
    ast.Gt: np.greater,
}
# Strings, or what Python's grammar reads in another way than this one. The first alternative wins.
_SPECIAL = re.compile(
    r"'[^'\\\n]*'|\"[^\"\\\n]*\"|(?<=\w):(?=\w)|(?<![<>=!])=(?!=)|[#\n\r\t\\]"
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
            found = _Evaluation(self, columns).condition(self._root)
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


class _Evaluation:
    """One pass over the tree of an expression; values are arrays (n,) or single numbers."""

    def __init__(self, expression: Expression, columns: Columns) -> None:
        self._expression, self._columns = expression, columns

    def condition(self, node: ast.expr) -> np.ndarray:
        """Evaluate what must be true or false."""
        match node:
            case ast.BoolOp(op=ast.And()):
                return np.logical_and.reduce(self._broadcast(map(self.condition, node.values)))
            case ast.BoolOp(op=ast.Or()):
                return np.logical_or.reduce(self._broadcast(map(self.condition, node.values)))
            case ast.UnaryOp(op=ast.Not()):
                return ~self.condition(node.operand)
            case ast.Compare():
                return self._compare(node)
            case ast.Call(func=ast.Name(id="missing")):
                return self._missing(node)
        raise self._error(node, f"{self._what(node)} is no condition: compare it with something")

    def value(self, node: ast.expr) -> np.ndarray:
        """Evaluate what must be a number or a text."""
        name = self._expression.column_of(node)
        if name is not None:
            return np.asarray(self._columns(name))
        match node:
            case ast.Constant(value=int() | float()):
                return self._constant(node, node.value)
            case ast.Constant(value=str()):
                return np.array(node.value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                return self._constant(node, -node.operand.value)
            case ast.UnaryOp(op=ast.USub()):
                return -_float(self.number(node.operand))
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.Call():
                return self._call(node)
        raise self._error(node, f"{self._what(node)} is not a number or a text")

    def number(self, node: ast.expr) -> np.ndarray:
        """Evaluate what must be a number."""
        value = self.value(node)
        if value.dtype.kind not in "iuf":
            raise self._error(node, f"{self._what(node)} is a text, where a number is needed")
        return value

    def _constant(self, node: ast.expr, value: int | float) -> np.ndarray:
        whole = isinstance(value, int) and -(2**63) <= value < 2**63
        try:
            return np.array(value, np.int64 if whole else np.float64)
        except OverflowError:
            raise self._error(node, "a number beyond 1e308") from None

    def _arithmetic(self, node: ast.BinOp) -> np.ndarray:
        left, right = _float(self.number(node.left)), _float(self.number(node.right))
        operation = _ARITHMETIC.get(type(node.op))
        if operation is not None:
            return operation(left, right)
        if not isinstance(node.op, ast.Div | ast.Mod):
            raise self._error(node, "of arithmetic there is + - * / %")
        divisor = np.where(right == 0, np.nan, right)
        return left / divisor if isinstance(node.op, ast.Div) else np.mod(left, divisor)

    def _compare(self, node: ast.Compare) -> np.ndarray:
        operands = [node.left, *node.comparators]
        found = [
            self._membership(left, operator, right)
            if isinstance(operator, ast.In | ast.NotIn)
            else self._pair(left, operator, right)
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False)
        ]
        return np.logical_and.reduce(self._broadcast(found))

    def _pair(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> np.ndarray:
        compare = _COMPARISONS.get(type(operator))
        if compare is None:
            raise self._error(right, "comparisons are < <= == != >= > in, not in")
        one, other = self.value(left), self.value(right)
        if (one.dtype.kind == "U") != (other.dtype.kind == "U"):
            raise self._error(
                right, f"{self._what(left)} and {self._what(right)}: a text and a number"
            )
        return compare(one, other) & ~_is_missing(one) & ~_is_missing(other)

    def _membership(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> np.ndarray:
        value = self.value(left)
        if isinstance(right, ast.List | ast.Tuple):
            members = self._members(right)
            if members and (value.dtype.kind == "U") != (members[0].dtype.kind == "U"):
                raise self._error(right, f"{self._what(left)} is not of the type of this list")
            found = np.isin(value, np.array(members)) if members else np.zeros(value.shape, bool)
        else:
            text = self.value(right)
            if value.dtype.kind != "U" or text.dtype.kind != "U":
                raise self._error(right, "behind `in` stands a list in [], or a column of texts")
            found = np.strings.find(text, value) >= 0
        found = ~found if isinstance(operator, ast.NotIn) else found
        return found & ~_is_missing(value)

    def _members(self, node: ast.List | ast.Tuple) -> list[np.ndarray]:
        members = []
        for element in node.elts:
            plain = element.operand if isinstance(element, ast.UnaryOp) else element
            if not isinstance(plain, ast.Constant):
                raise self._error(element, "a list holds plain numbers or texts")
            members.append(self.value(element))
        if len({member.dtype.kind == "U" for member in members}) > 1:
            raise self._error(node, "a list holds either numbers or texts")
        return members

    def _call(self, node: ast.Call) -> np.ndarray:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        least = {"min": 2, "max": 2, "abs": 1}.get(name)
        if name in ("missing", "column"):
            what = "is a condition" if name == "missing" else 'takes one name, as column("a b")'
            raise self._error(node, f"{name}(...) {what}")
        if least is None:
            raise self._error(node, "functions are min, max, abs, missing, column")
        if node.keywords or len(node.args) < least or (name == "abs" and len(node.args) > 1):
            count = "one number" if name == "abs" else "two or more numbers"
            raise self._error(node, f"{name} takes {count}")
        values = [_float(self.number(argument)) for argument in node.args]
        if name == "abs":
            return np.abs(values[0])
        return (np.minimum if name == "min" else np.maximum).reduce(self._broadcast(values))

    def _missing(self, node: ast.Call) -> np.ndarray:
        if len(node.args) != 1 or node.keywords:
            raise self._error(node, "missing takes one column or number")
        return _is_missing(self.value(node.args[0]))

    @staticmethod
    def _broadcast(values: Iterable[np.ndarray]) -> list[np.ndarray]:
        return np.broadcast_arrays(*values)

    def _what(self, node: ast.expr) -> str:
        written = ast.unparse(node)
        name = self._expression.column_of(node)
        return f"`{name or (written if len(written) <= 60 else written[:57] + '...')}`"

    def _error(self, node: ast.AST, what: str) -> ExpressionError:
        return self._expression._error(node, what)


def _is_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "U":
        return values == MISSING_TEXT
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


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
