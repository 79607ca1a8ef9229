"""YAML layers: dialect, merging, overrides, and where each value was written."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.recipe.overlay import (
    Layer,
    RecipeError,
    expand_variables,
    map_strings,
    merge,
    parse_override,
    parse_yaml,
    read_recipe_layers,
    to_flow_yaml,
    to_yaml,
)


def value_of(text: str):
    return parse_yaml(f"v: {text}", "t").data["v"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5E-05", 5e-5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("-0.0", -0.0),
        ("1.", 1.0),
        ("1e5", 100000),
        ("1_000_000", 1000000),
        ("0x10", 16),
        ("-7", -7),
        (".inf", math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e5'", "1e5"),
        ("data/{000..011}.tar", "data/{000..011}.tar"),
    ],
)
def test_scalars(text, value):
    found = value_of(text)
    assert (found, type(found)) == (value, type(value))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")))
    | st.sampled_from(["1e5", "on", "null", "~", "0x1", "007", "1_0", ".5", "- a", "a: b", "#x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.*1", min_size=1), inner)
    ),
)


@settings(max_examples=25)
@given(st.dictionaries(st.text("abc.*", min_size=1), plain))
def test_written_yaml_reads_back_equal(data):
    assert parse_yaml(to_yaml(data), "t").data == data
    flow = "".join(f"{to_flow_yaml(key)}: {to_flow_yaml(value)}\n" for key, value in data.items())
    assert parse_yaml(flow, "t").data == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3", r"f:4: b\.c: given twice \(f:3\)"),
        ("a: [1", r"f:1: not valid YAML: .*expected ',' or '\]'"),
        ("- a", "f: expected `key: value` lines, found list"),
        ("1: a\n? [x]\n: y", "f:2: top level: a key must be plain text"),
        ("a: !!python/object/apply:os.getcwd []", "f:1: a: the YAML tag .* is not allowed"),
        ("a: !!python/name:os.getcwd ''", "f:1: not valid YAML: could not determine"),
        ("a: *nowhere", "f:1: not valid YAML: found undefined alias"),
    ],
)
def test_faults_of_the_text(text, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        parse_yaml(text, "f")


def layer(text: str, source: str = "f") -> Layer:
    return parse_yaml(text, source)


def test_mappings_merge_and_everything_else_is_replaced():
    below = layer("a: {b: 1, c: {d: 2}}\nlist: [1, 2]\nkeep: x", "below")
    above = layer("a:\n  c: {e: 3}\n  b: null\nlist: [9]\nnew: {x: 1}", "above")
    merged = merge(below, above)
    assert merged.data == {
        "a": {"b": None, "c": {"d": 2, "e": 3}},
        "list": [9],
        "keep": "x",
        "new": {"x": 1},
    }
    assert below.data["a"]["c"] == {"d": 2}, "layers are not changed"
    sources = {key: merged.source(tuple(key.split("."))) for key in ("a.c.d", "a.c.e", "list")}
    assert sources == {"a.c.d": "below:1", "a.c.e": "above:2", "list": "above:4"}
    assert merged.source(("keep", "unknown")) == "below:3"
    assert merged.source(("nowhere",)) == "below"


def test_another_type_replaces_the_block():
    below = layer("e:\n  type: vit\n  heads: 3", "below")
    other = merge(below, layer("e: {type: internimage, groups: 4}", "above"))
    assert other.data == {"e": {"type": "internimage", "groups": 4}}
    assert other.source(("e", "heads")) == "above:1", "no trace of what was replaced"
    same = merge(below, layer("e: {type: vit, heads: 4}", "above"))
    assert same.data == {"e": {"type": "vit", "heads": 4}}


def test_a_block_over_a_value_is_an_error():
    with pytest.raises(RecipeError, match=r"o:1: a is \[1\] \(f:1\) and has no keys inside"):
        merge(layer("a: [1]"), layer("a: {b: 1}", "o"))
    assert merge(layer("a: null"), layer("a: {b: 1}")).data == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("steps=100", {"steps": 100}),
        ("a.b.c=1e-3", {"a": {"b": {"c": 1e-3}}}),
        ("a=[x, 2]", {"a": ["x", 2]}),
        ("a={b: 1, c: [2]}", {"a": {"b": 1, "c": [2]}}),
        ("a=", {"a": None}),
        ("a=x=y", {"a": "x=y"}),
        ('o."enc.*.weight".x=2', {"o": {"enc.*.weight": {"x": 2}}}),
        ("a='{b,c}.tar'", {"a": "{b,c}.tar"}),
    ],
)
def test_overrides(text, data):
    found = parse_override(text)
    assert found.data == data
    assert found.source(("a", "b", "c")) == f"override {text!r}"


@pytest.mark.parametrize("text", ["steps", "=1", "a..b=1", ".a=1", "a.=1", "a b=1", 'a."b=1'])
def test_overrides_without_a_key_are_refused(text):
    with pytest.raises(RecipeError, match=r"expected key\.path=value"):
        parse_override(text)


@pytest.mark.parametrize("text", ["a={b,c}: {", "a=[1", "a=x: y: z", 'a="'])
def test_overrides_without_a_value_are_refused(text):
    with pytest.raises(RecipeError, match="is not a YAML value; put text with special characters"):
        parse_override(text)


def test_base_chain(tmp_path):
    shipped = tmp_path / "shipped"
    (tmp_path / "sub").mkdir()
    shipped.mkdir()
    (shipped / "root.yaml").write_text("a: 1\nb: 1\nc: 1\n")
    (tmp_path / "mid.yaml").write_text("base: root\nb: 2\n")
    (tmp_path / "sub" / "top.yaml").write_text("base: ../mid.yaml\nc: 3\n")
    found = read_recipe_layers(tmp_path / "sub" / "top.yaml", shipped)
    assert found.data == {"a": 1, "b": 2, "c": 3}
    assert found.source(("b",)).endswith("mid.yaml:2")
    assert found.source(("nowhere",)) == str(tmp_path / "sub" / "top.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: top.yaml", r"recipes name each other in a circle: top\.yaml -> top\.yaml"),
        ("x: 1\nbase: rooot", r"top\.yaml:2: base: no recipe file .*rooot.*did you mean 'root'\?"),
        ("base: [a, b]", r"top\.yaml:1: base: expected one file or recipe name"),
        ("base: null\nx: [", r"top\.yaml:2: not valid YAML"),
    ],
)
def test_base_faults(tmp_path, text, message):
    (tmp_path / "root.yaml").write_text("a: 1")
    path = tmp_path / "top.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe_layers(path, tmp_path)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read_recipe_layers(tmp_path, tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: \xe9")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 3\)"):
        read_recipe_layers(path, tmp_path)


def test_variables(monkeypatch):
    monkeypatch.setenv("SHARDS", "/big")
    monkeypatch.delenv("NOWHERE", raising=False)
    found = expand_variables(layer('a: ${SHARDS}/x\nb: ["${SHARDS}", 3]\nc: {d: $SHARDS}'))
    assert found.data == {"a": "/big/x", "b": ["/big", 3], "c": {"d": "$SHARDS"}}
    with pytest.raises(RecipeError, match=r"f:2: a\.b: environment variable NOWHERE is not set"):
        expand_variables(layer("a:\n  b: ${NOWHERE}/x"))


def test_map_strings_at_patterns():
    data = {"p": "x", "t": {"a": {"s": ["x", 1]}, "b": {"s": "x", "n": "x"}}, "q": "x"}
    assert map_strings(data, ("p", "t.*.s"), str.upper) == {
        "p": "X",
        "t": {"a": {"s": ["X", 1]}, "b": {"s": "X", "n": "x"}},
        "q": "x",
    }
