"""The map of the house: which room may import from which, and that no way leads back.

Every `import` counts, also one inside a function and one for types only: whoever reads a file has
to know what these name. One kind does not: settings build the object that they describe, and name
its class where they do (`build`), while the class reads the settings; both lie side by side.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    ["tools", "tools/compare"],
    ["tools/shards"],
    ["tools/benchmark", "tools/finetune", "tools/judge", "tools/selfcheck"],
    ["tools/convert", "tools/make_shards"],
    ["tools/support"],
    ["slurm"],
    ["pretrain", "pretrain/plan"],
    ["pretrain/recipe"],
    ["pretrain/engine"],
    ["pretrain/engine/checkpoint"],
    ["pretrain/engine/control"],
    ["pretrain/engine/report"],
    ["pretrain/engine/launch", "pretrain/engine/zero"],
    ["pretrain/objectives"],
    ["pretrain/optim", "pretrain/sampler"],
    ["pretrain/models"],
    ["pretrain/models/operators"],
    ["ds_configs"],
    ["data_pipeline/loader"],
    ["data_pipeline/samples", "data_pipeline/cache"],
    ["data_pipeline/reading"],
    ["data_pipeline/order"],
    ["data_pipeline/filters"],
    ["data_pipeline/shards"],
    ["data_pipeline/images", "data_pipeline/storage"],
    ["data_pipeline"],
]
"""Rooms, from those that know the most to those that know nothing. A room has the folders in it
that are no rooms of their own. An arrow leads to a lower floor, or stays in its room."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 18
"""In a folder; more make a room of their own."""
EXEMPT = {"slurm"}
"""Its verbs are modules that people name: `python -m slurm.submit`."""


class Arrow(NamedTuple):
    """One import."""

    source: str
    target: str
    """Paths of files."""
    line: int
    builds: bool
    """Whether it is that of settings for the class that they build."""


@cache
def arrows() -> list[Arrow]:
    """All imports among the files of the project, tests aside."""
    tops = sorted({room.split("/")[0] for room in FLOOR_OF})
    paths = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    files = {_module(path): path.relative_to(ROOT).as_posix() for path in paths}
    found = []
    for path in paths:
        source = path.relative_to(ROOT).as_posix()
        of_settings = path.stem.endswith("settings")
        for node, builds in _imports(ast.parse(path.read_text(encoding="utf-8")), of_settings):
            for name in _names(node):
                target = files.get(name) or files.get(name.rpartition(".")[0])
                if target not in (None, source):
                    beside = _folder(source) == _folder(target)
                    found.append(Arrow(source, target, node.lineno, builds and beside))
    return found


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(
    node: ast.AST, of_settings: bool, later: bool = False
) -> Iterable[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports below a node, and whether they are of settings that build something: in a file or a
    class of settings, inside a function or for types."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, of_settings and later
        else:
            settings = isinstance(child, ast.ClassDef) and child.name.endswith("Settings")
            inside = isinstance(child, ast.FunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and _for_types(child.test)
            yield from _imports(child, of_settings or settings, later or inside or typing)


def _for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _room(file: str) -> str:
    folder = _folder(file)
    while folder not in FLOOR_OF:
        folder = _folder(folder)
    return folder


def circles(ways: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups from each of whose members a way leads to every other one."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_ones: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        open_ones.append(node)
        for to in ways.get(node, ()):
            if to not in number:
                visit(to)
                lowest[node] = min(lowest[node], lowest[to])
            elif to in open_ones:
                lowest[node] = min(lowest[node], number[to])
        if lowest[node] == number[node]:
            group = open_ones[open_ones.index(node) :]
            del open_ones[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(ways):
        if node not in number:
            visit(node)
    return found


def _ways(named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    ways = defaultdict(set)
    for source, target in named:
        if source != target:
            ways[source].add(target)
    return ways


def test_arrows_lead_down():
    wrong = [
        f"{arrow.source}:{arrow.line} imports {arrow.target}"
        for arrow in arrows()
        if _room(arrow.source) != _room(arrow.target)
        and FLOOR_OF[_room(arrow.source)] >= FLOOR_OF[_room(arrow.target)]
    ]
    assert wrong == []


def test_no_circle_among_files():
    assert circles(_ways((a.source, a.target) for a in arrows() if not a.builds)) == []


def test_no_circle_among_folders():
    assert circles(_ways((_folder(a.source), _folder(a.target)) for a in arrows())) == []


@pytest.mark.parametrize(
    ("below", "unknown"),
    [
        ("pretrain/engine", "pretrain/recipe"),
        ("pretrain/objectives", "pretrain/recipe"),
        ("pretrain/models", "pretrain/recipe"),
        ("pretrain/optim", "pretrain/recipe"),
        ("pretrain/sampler", "pretrain/recipe"),
        ("data_pipeline", "pretrain"),
        ("pretrain", "tools"),
        ("pretrain", "slurm"),
        ("slurm", "tools"),
    ],
)
def test_who_knows_whom(below, unknown):
    """What the floors imply, once more: these are promises, whatever becomes of the map."""
    assert [
        arrow
        for arrow in arrows()
        if f"{arrow.source}/".startswith(f"{below}/")
        and f"{arrow.target}/".startswith(f"{unknown}/")
    ] == []


def _asks_for_kinds(file: str, tree: ast.AST, home_of: Mapping[str, str]) -> Iterable[str]:
    """Lines that treat one kind of objective, encoder or data apart, outside its own folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked = re.search(r"\b(objective|encoder|data)\.type$", ast.unparse(node.left))
            if asked and not any(isinstance(to, ast.Attribute) for to in node.comparators):
                yield f"{file}:{node.lineno} compares {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("signature"):
            yield f"{file}:{node.lineno} looks at the arguments of {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            for name in re.findall(r"\w+Settings\b", ast.unparse(node.args[1])):
                if home_of[name] != _folder(file):
                    yield f"{file}:{node.lineno} asks for {name} of {home_of[name]}"


def test_nobody_asks_for_a_kind_but_who_owns_it():
    """A kind says by methods of its base class what it is; whoever wants to know calls them."""
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "pretrain").rglob("*.py")]
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in paths}
    home_of = {
        node.name: _folder(path)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert [line for f, t in trees.items() for line in _asks_for_kinds(f, t, home_of)] == []
    bad = "if task.objective.type == 'm3i' or isinstance(x, M3ISettings | VitSettings): pass"
    assert len(list(_asks_for_kinds("pretrain/trainer.py", ast.parse(bad), home_of))) == 3
    bad = "if encoder.type in ('vit',) and len(inspect.signature(encoder).parameters) > 2: pass"
    assert len(list(_asks_for_kinds("pretrain/trainer.py", ast.parse(bad), home_of))) == 2


def test_folders_can_be_overlooked():
    files = {arrow.source for arrow in arrows()} | {arrow.target for arrow in arrows()}
    sizes = Counter(_folder(file) for file in files if not file.endswith("__init__.py"))
    assert {f: n for f, n in sizes.items() if n > MOST_FILES and f not in EXEMPT} == {}


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"]}) == [["a", "b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"]}) == []
