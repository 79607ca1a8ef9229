"""YAML recipes as layers: `base:` files, the file itself, then overrides, merged in that order.

A layer remembers where every value was written (file and line, or the override), so that an error
can point there. The YAML dialect is the safe subset that recipes need, with YAML 1.2 scalars:
`1e-5` is a number (PyYAML alone reads a string), `1e5` a whole one, and `on`, `no`, `12:30` are
strings.

Merge rules: mappings merge key by key; everything else, lists included, is replaced. A mapping
whose `type` differs from the one below replaces it whole, since its old fields belong to another
class. `null` sets None; in a mapping with free names (`tasks`, say) it removes the entry, which is
done in load.py, where the schema is known.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str, ...]


class RecipeError(ValueError):
    """A recipe that cannot be used; one line per fault: where, key path, what to do."""


class MissingSpace(RecipeError):
    """`{caption:1}`: YAML reads a key `caption:1` without a value, and null would remove it."""


@dataclass(frozen=True)
class Layer:
    """Plain data (dict, list, str, int, float, bool, None) and where each key was written."""

    data: dict[str, Any]
    written: dict[KeyPath, str]

    def source(self, path: KeyPath) -> str:
        """Where the key, or the closest mapping around it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.written:
                return self.written[path[:length]]
        return self.written[()]


# ------------------------------------------------------------------------------------ YAML dialect

_NUMBER_START = list("-+.0123456789")
_SCALARS: list[tuple[str, str, list[str]]] = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$", _NUMBER_START),
    (
        "float",
        r"^(?:[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        _NUMBER_START,
    ),
]


_PLAIN_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's interface)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly those strings that `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """`1e5` is a whole number of steps; `1e-5` and `1.0` are not whole."""
    value = loader.construct_yaml_float(node)
    is_whole = "." not in node.value and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value


_Loader.add_constructor("tag:yaml.org,2002:float", _number)

for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def to_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back as equal data (keys keep their order)."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_flow_yaml(value: Any) -> str:
    """One value on one line, as it would stand behind `key: ` (or in an override)."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=True,
        width=2**31,
        explicit_end=False,
    )
    return text.removesuffix("...\n").strip()


def parse_yaml(text: str, source: str) -> Layer:
    """Read one YAML document whose top level is a mapping; `source` names it in errors."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        written: dict[KeyPath, str] = {(): source}
        data = {} if node is None else _construct(loader, node, (), source, written)
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_message(error, source)) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: expected `key: value` lines, found {type(data).__name__}")
    return Layer(data, written)


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, source: str, written: dict[KeyPath, str]
) -> Any:
    """Node -> plain data, refusing what a plain dict would swallow: doubled or non-text keys."""
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
        line = f"{source}:{node.start_mark.line + 1}"
        raise RecipeError(f"{line}: {'.'.join(path)}: the YAML tag {node.tag} is not allowed")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, "[]"), source, {}) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{source}:{key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise RecipeError(f"{line}: {'.'.join(path) or 'top level'}: a key must be plain text")
        here = (*path, key)
        is_bare = isinstance(value_node, yaml.ScalarNode) and value_node.value == ""
        if node.flow_style and is_bare and key_node.style is None and ":" in key:
            begin, _, end = key.partition(":")
            raise MissingSpace(f"{line}: {key}: YAML wants a space: {{{begin}: {end}}}")
        if key in data:
            raise RecipeError(f"{line}: {'.'.join(here)}: given twice ({written.get(here, line)})")
        written[here] = line
        data[key] = _construct(loader, value_node, here, source, written)
    return data


def _yaml_message(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{source}:{mark.line + 1}" if mark is not None else source
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"{place}: not valid YAML: {problem}"


# ---------------------------------------------------------------------------------- reading layers


def read_recipe_layers(path: Path, shipped: Path) -> Layer:
    """Read a recipe file and, below it, the chain of its `base:` files; merged, without `base`.

    `base` is a path relative to the file that names it, or the name of a recipe in `shipped`.
    """
    chain: list[Path] = []
    layers: list[Layer] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in chain:
            names = " -> ".join(p.name for p in [*chain, current])
            raise RecipeError(f"{current}: base: recipes name each other in a circle: {names}")
        chain.append(current.resolve())
        layer = parse_yaml(_read_text(current), str(current))
        base = layer.data.pop("base", None)
        layers.append(layer)
        if base is not None and not isinstance(base, str):
            raise RecipeError(f"{layer.source(('base',))}: base: expected one file or recipe name")
        where = layer.source(("base",))
        current = None if base is None else find_recipe(base, current.parent, shipped, where)
    merged = layers.pop()
    while layers:
        merged = merge(merged, layers.pop())
    return Layer(merged.data, {**merged.written, (): str(path)})


def find_recipe(name: str, folder: Path, shipped: Path, where: str = "") -> Path:
    """A file (path relative to `folder`), or the shipped recipe of that name."""
    candidate = folder / Path(name).expanduser()
    if candidate.is_file():
        return candidate
    known = sorted(p.stem for p in shipped.glob("*.yaml"))
    stem = name.removesuffix(".yaml")
    if stem in known:
        return shipped / f"{stem}.yaml"
    near = get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    prefix = f"{where}: base: " if where else ""
    raise RecipeError(f"{prefix}no recipe file {candidate} and no shipped recipe {name!r}; {hint}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None


_SEGMENT = re.compile(r'"([^"]+)"|([^."=\s]+)')


def parse_override(text: str) -> Layer:
    """`tasks.caption.micro_batch=8` as a layer; the value is YAML.

    A key that contains dots is quoted: `optimizer.lr_multipliers."encoders.*"=0.2`.
    """
    source = f"override {text!r}"
    path: list[str] = []
    position = 0
    while match := _SEGMENT.match(text, position):
        path.append(match[1] or match[2])
        position = match.end()
        if not _SEGMENT.match(text, position + 1) or text[position] != ".":
            break
        position += 1
    if not path or text[position : position + 1] != "=":
        raise RecipeError(f'{source}: expected key.path=value, e.g. steps=100 or a."b.*".c=0.2')
    value_text = text[position + 1 :]
    try:
        value = parse_yaml(f"value: {value_text}", source).data["value"]
    except MissingSpace:
        raise
    except (RecipeError, KeyError):
        raise RecipeError(
            f"{source}: {value_text!r} is not a YAML value; put text with special characters in "
            f"quotes: {'.'.join(path)}='\"...\"'"
        ) from None
    data: Any = value
    for key in reversed(path):
        data = {key: data}
    written = {tuple(path[:length]): source for length in range(len(path) + 1)}
    return Layer(data, written)


# ------------------------------------------------------------------------- merging and expansion


def merge(below: Layer, above: Layer) -> Layer:
    """`above` laid over `below`; see the merge rules in the module docstring."""
    written = dict(below.written)
    data = _merge_mappings(below.data, above.data, (), written, above)
    return Layer(data, {**written, **{k: v for k, v in above.written.items() if k}})


def _merge_mappings(
    below: dict[str, Any],
    above: dict[str, Any],
    path: KeyPath,
    written: dict[KeyPath, str],
    layer: Layer,
) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        here = (*path, key)
        old = merged.get(key)
        if not isinstance(value, dict):
            merged[key] = value
        elif isinstance(old, dict) and not _changes_type(old, value):
            merged[key] = _merge_mappings(old, value, here, written, layer)
            continue
        elif old is None or isinstance(old, dict):
            merged[key] = value
        else:
            raise RecipeError(
                f"{layer.source(here)}: {'.'.join(here)} is {old!r} ({written.get(here, 'below')})"
                " and has no keys inside; lists are replaced as a whole"
            )
        for stale in [k for k in written if k[: len(here)] == here]:
            del written[stale]
    return merged


def _changes_type(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "type" in old and "type" in new and old["type"] != new["type"]


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand_variables(layer: Layer) -> Layer:
    """Replace `${NAME}` in every string by the environment variable; an unset one is an error."""

    def expand(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: expand(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [expand(item, path) for item in value]
        if not isinstance(value, str):
            return value
        for name in _VARIABLE.findall(value):
            if name not in os.environ:
                raise RecipeError(
                    f"{layer.source(path)}: {'.'.join(path)}: environment variable {name} is not "
                    f"set (in {value!r})"
                )
        return _VARIABLE.sub(lambda match: os.environ[match[1]], value)

    return Layer(expand(layer.data, ()), layer.written)


def map_strings(
    data: Any, patterns: tuple[str, ...], change: Callable[[str], str], path: KeyPath = ()
) -> Any:
    """Apply `change` to strings, or lists of strings, at the key paths `patterns` (`*` = any)."""
    if isinstance(data, dict):
        return {k: map_strings(v, patterns, change, (*path, k)) for k, v in data.items()}
    if not any(_is_at(path, pattern.split(".")) for pattern in patterns):
        return data
    if isinstance(data, list):
        return [change(item) if isinstance(item, str) else item for item in data]
    return change(data) if isinstance(data, str) else data


def _is_at(path: KeyPath, pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(
        expected in ("*", key) for key, expected in zip(path, pattern, strict=True)
    )
