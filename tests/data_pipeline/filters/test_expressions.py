"""Conditions on columns mean what Python means by them, row by row, but for missing numbers."""

import math
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.expressions import Expression, ExpressionError, UnknownColumn
from data_pipeline.shards.columns import MISSING_TEXT

ROWS = 12
NAN = float("nan")
COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def columns_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    holes = rng.integers(-4, 5, ROWS) / 2
    holes[rng.random(ROWS) < 0.3] = np.nan
    return {
        "width": rng.integers(-3, 4, ROWS),
        "a.b": holes,
        "bytes:jpg": rng.integers(0, 3, ROWS).astype(np.float64),
        "odd name": rng.integers(2**62, 2**63 - 1, ROWS),
        "key": np.array([f"x/{n % 4}" for n in range(ROWS)]),
    }


# Expressions are drawn as pairs: how they are written, and what they mean for one row.


def _divide(a: float, b: float) -> float:
    return NAN if b == 0 else a / b


def _modulo(a: float, b: float) -> float:
    return NAN if b == 0 or math.isnan(a) or math.isnan(b) else a % b


def _extreme(choose):
    return lambda *values: NAN if any(map(math.isnan, values)) else choose(values)


def _compare(name: str, a: float, b: float) -> bool:
    return not (math.isnan(a) or math.isnan(b)) and COMPARE[name](a, b)


leaves = st.one_of(
    st.sampled_from(["width", "a.b", "bytes:jpg"]).map(lambda n: (n, lambda row: float(row[n]))),
    st.sampled_from(["0", "1", "2", "0.5", "1e1", "True", "-3"]).map(
        lambda text: (text, lambda row: float(eval(text)))
    ),
)


def _deeper(inner):
    def pair(sign, function):
        return st.tuples(inner, inner).map(
            lambda two: (
                f"({two[0][0]} {sign} {two[1][0]})",
                lambda row: function(two[0][1](row), two[1][1](row)),
            )
        )

    def call(name, function):
        return st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: (
                f"{name}({', '.join(text for text, _ in parts)})",
                lambda row: function(*(value(row) for _, value in parts)),
            )
        )

    return st.one_of(
        pair("+", operator.add),
        pair("-", operator.sub),
        pair("*", operator.mul),
        pair("/", _divide),
        pair("%", _modulo),
        call("min", _extreme(min)),
        call("max", _extreme(max)),
        inner.map(lambda one: (f"abs({one[0]})", lambda row: abs(one[1](row)))),
        inner.map(lambda one: (f"(-{one[0]})", lambda row: -one[1](row))),
    )


numbers = st.recursive(leaves, _deeper, max_leaves=6)


def _chain(drawn):
    first, rest = drawn
    text = first[0] + "".join(f" {sign} {number[0]}" for sign, number in rest)

    def value(row):
        left, true = first[1](row), True
        for sign, number in rest:
            right = number[1](row)
            true, left = true and _compare(sign, left, right), right
        return true

    return text, value


def _membership(drawn):
    number, negated, members = drawn
    text = f"{number[0]} {'not ' if negated else ''}in {members}"

    def value(row):
        found = number[1](row)
        return not math.isnan(found) and (found in members) != negated

    return text, value


comparisons = st.one_of(
    st.tuples(
        numbers, st.lists(st.tuples(st.sampled_from([*COMPARE]), numbers), min_size=1, max_size=3)
    ).map(_chain),
    st.tuples(numbers, st.booleans(), st.lists(st.sampled_from([-1, 0, 1.5, 2]))).map(_membership),
    numbers.map(lambda one: (f"missing({one[0]})", lambda row: math.isnan(one[1](row)))),
)


def _logic(inner):
    def join(word, function):
        return st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: (
                "(" + f" {word} ".join(text for text, _ in parts) + ")",
                lambda row: function(value(row) for _, value in parts),
            )
        )

    return st.one_of(
        join("and", all),
        join("or", any),
        inner.map(lambda one: (f"(not {one[0]})", lambda row: not one[1](row))),
    )


conditions = st.recursive(comparisons, _logic, max_leaves=5)


@given(conditions, st.integers(0, 50))
@settings(max_examples=250)
def test_columns_at_once_give_what_each_row_gives(condition, seed):
    text, meaning = condition
    columns = columns_of(seed)
    found = Expression(text)(columns.__getitem__, ROWS)
    assert found.dtype == bool and found.shape == (ROWS,)
    rows = [{name: values[i] for name, values in columns.items()} for i in range(ROWS)]
    assert found.tolist() == [meaning(row) for row in rows], text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("width >= 2", [2, 3]),
        ("1 < width < 3", [2]),
        ("score > 0", [0, 3]),
        ("score != 5", [0, 3]),  # a missing number is in no comparison
        ("not score > 0", [1, 2]),  # but `not` turns any false into true
        ("missing(score)", [1, 2]),
        ("not missing(score) and width % 2 == 1", [3]),
        ("score not in [0.5]", [3]),
        ("width in [0, -1, 3]", [0, 3]),
        ("width in []", []),
        ("1 / width > 0.4", [1, 2]),
        ("key == 'a/1'", [1]),
        ('key in ["a/0", "b:3"]', [0, 3]),
        ('"b" not in key', [0, 1]),
        ('shard < "s2" and key != "a/0"', [1]),
        ("column('odd name') == 9007199254740993", [1]),  # whole numbers are compared exactly
        ("width == True or\n   width == 3", [1, 3]),
        ("größe.höhe >= 7 and 2 > 1", [3]),
        ("99999999999999999999 > width > -99999999999999999999", [0, 1, 2, 3]),
        ("max(width, 2, score) == 2 and min(width, 1) == 0", [0]),
        ("licence == 'CC BY'", [0, 3]),
        ("licence != 'CC BY'", [2]),  # a missing text is in no comparison either
        ("licence not in ['CC BY', 'x'] or missing(licence)", [1, 2]),
        ("'C' in licence and not missing(score)", [0, 3]),
        ("licence == other == 'CC BY'", [0]),
    ],
)
def test_what_conditions_keep(text, kept):
    columns = {
        "width": np.arange(4),
        "score": np.array([0.5, np.nan, np.nan, 2.0]),
        "odd name": np.array([2**53, 2**53 + 1, 0, 0]),
        "größe.höhe": np.array([1, 2, 6, 7]),
        "key": np.array(["a/0", "a/1", "b/2", "b:3"]),
        "shard": np.array(["s1", "s1", "s2", "s2"]),
        "licence": np.array(["CC BY", MISSING_TEXT, "?", "CC BY"]),
        "other": np.array(["CC BY", "CC BY", "?", ""]),
    }
    found = Expression(text)(columns.__getitem__, 4)
    assert np.flatnonzero(found).tolist() == kept


def test_columns_are_listed_with_their_places():
    found = Expression(" 'é:x' in key or max(a.b, bytes:jpg) > min or missing(column('a b'))")
    assert found.columns == {"key": 11, "a.b": 22, "bytes:jpg": 27, "min": 40, "a b": 55}


def test_types_of_columns_follow_from_what_they_are_compared_with():
    found = Expression("a == 'x' and b in ['y'] and 'z' in c and d == a and missing(e) or f > g")
    assert found.texts == {"a", "b", "c", "d"} and found.numbers == {"f", "g"}
    both = Expression("missing(f) and f > 1 or key == h or missing(h)")
    assert both.texts == {"key", "h"} and both.numbers == {"f"}


def test_unknown_columns_come_with_a_suggestion():
    with pytest.raises(UnknownColumn) as error:
        Expression("width > 1 and captons.count > 0").check_columns(["width", "captions.count"])
    assert str(error.value) == (
        "condition `width > 1 and captons.count > 0`: character 15: unknown column "
        "'captons.count'; did you mean 'captions.count'? There are captions.count, key, shard, "
        "width"
    )
    Expression("key == 'a' and width > 2").check_columns(["width"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid syntax"),
        ("width >", "invalid syntax"),
        ("width = 3", "character 7: to compare, write =="),
        ("width", "character 1: `width` is no condition"),
        ("a + (b > 1) > 2", r"character 6: `b > 1` is not a number or a text"),
        ("a > 1 and 3", "character 11: `3` is no condition"),
        ("a > 'x' and a > 1", "character 17: `a` and `1`: a text and a number"),
        ("a + 1 > 'x'", "character 9: `a \\+ 1` and `'x'`: a text and a number"),
        ("key > 1", "`key` and `1`: a text and a number"),
        ("key + 1 > 1", "`key` is a text, where a number is needed"),
        ("a in 3", r"a list in \[\]"),
        ("a in [1, 'x']", "either numbers or texts"),
        ("abs(a) in ['x']", r"`abs\(a\)` is not of the type of this list"),
        ("a in ['x'] or a in [1]", "character 20: `a` is not of the type of this list"),
        ("a in [b]", "plain numbers or texts"),
        ("a ** 2 > 1", "of arithmetic there is"),
        ("a // 2 > 1", "of arithmetic there is"),
        ("a is 1", "comparisons are"),
        ("__import__('os').system('x') > 1", "functions are min, max, abs"),
        ("(lambda: 1)() > 1", "functions are"),
        ("[x for x in a] > 1", "is not a number or a text"),
        ("a[0] > 1", "is not a number"),
        ("(a := 1) > 1", "to compare, write =="),
        ("a > 1 if b > 1 else c > 1", "is no condition"),
        ("f'{a}' == 'x'", "is not a number or a text"),
        ("a > 1j", "is not a number or a text"),
        ("abs(a, b) > 1", "abs takes one number"),
        ("min(a) > 1", "min takes two or more"),
        ("max(*a) > 1", "max takes two"),
        ("missing(a, b)", "missing takes one"),
        ("missing(a) > 1", r"missing\(...\) is a condition"),
        ("column(a) > 1", "takes one name"),
        ("sqrt(a) > 1", "functions are"),
        ("a > 1 # and b > 1", "character 7: unexpected '#'"),
        ("a > '\\x41'", "unexpected"),
        ("a > 1" + "0" * 400, "beyond 1e308"),
        ("(" * 3000 + "a" + ")" * 3000 + " > 1", "."),
        ("not " * 3000 + "a > 1", "."),
        ("a" + " + a" * 20_000 + " > 1", "nested too deep"),
        ("a > \0", "."),
        ("a > 1 " * 20_000, "more than 100000 characters"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ExpressionError, match=message):
        Expression(text)


@given(st.text("ab1.:()[]'\" <>=!+-*/%,notandmissing#\\\n{}é", max_size=30))
@settings(max_examples=300)
def test_no_text_ends_in_another_error(text):
    try:
        found = Expression(text)
    except ExpressionError:
        return
    values = {name: np.arange(3.0) for name in found.columns} | {"key": np.array(["a", "b", "c"])}
    assert found(values.__getitem__, 3).shape == (3,)


@pytest.mark.parametrize("name", ["class", "exif.from", "bytes:class", "yield", "as.global"])
def test_words_of_python_are_names_of_columns(name):
    expression = Expression(f"{name} > 1 or not missing({name}) and {name} / 2 > 3")
    assert list(expression.columns) == [name]
    found = expression(lambda column: {name: np.array([0.0, 2.0, NAN, 9.0])}[column], 4)
    assert found.tolist() == [False, True, False, True]


def test_folders_of_classes_can_be_asked_for():
    expression = Expression("class in ['owl', 'emu'] and class != 'emu' and 'class' != class")
    texts = np.array(["owl", "emu", "cat", MISSING_TEXT])
    found = expression(lambda name: {"class": texts}[name], 4)
    assert found.tolist() == [True, False, False, False]
    with pytest.raises(ExpressionError, match="`Class \\+ 1` is no condition"):
        Expression("class + 1")
    with pytest.raises(ExpressionError, match="unknown column 'class'"):
        Expression("class > 1").check_columns(["width"])
