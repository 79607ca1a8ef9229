"""Values of the parts of a condition on whole columns; see expressions.py for what they mean."""

import ast
from collections.abc import Callable, Iterable

import numpy as np

from data_pipeline.shards.columns import MISSING_TEXT

Columns = Callable[[str], np.ndarray]
"""Name of a column -> (n,) numbers, NaN where missing, or texts, MISSING_TEXT where missing."""

_ARITHMETIC = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply}
_COMPARISONS = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
    ast.GtE: np.greater_equal,
    ast.Gt: np.greater,
}


class Evaluation:
    """One pass over the tree of an expression; values are arrays (n,) or single numbers."""

    def __init__(
        self,
        columns: Columns,
        column_of: Callable[[ast.AST], str | None],
        error: Callable[[ast.AST, str], Exception],
    ) -> None:
        """Take what nodes mean.

        Args:
            columns: gives columns by name.
            column_of: name of the column that a node stands for, None for other nodes.
            error: the exception that names a node and says what is wrong with it.
        """
        self._columns, self._column_of, self._error = columns, column_of, error

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
        name = self._column_of(node)
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
        name = self._column_of(node)
        return f"`{name or (written if len(written) <= 60 else written[:57] + '...')}`"


def _is_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "U":
        return values == MISSING_TEXT
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)
