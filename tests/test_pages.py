"""What the pages say is so: links and commands lead somewhere, examples run, every file is listed.

And they stay readable: a page for each room, no paragraph that goes on for ever.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
from functools import cache
from pathlib import Path

import pytest

from pretrain.recipe.load import SHIPPED
from tools.make_shards import __main__ as make_shards
from tools.shards import __main__ as shards

ROOT = Path(__file__).parents[1]
ROOMS = ("pretrain", "data_pipeline", "ds_configs", "slurm", "tools")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *(p for top in (*ROOMS, "tests") for p in (ROOT / top).rglob("*.md")),
    )
]
LONGEST_PARAGRAPH = 500
LONGEST_FIRST_PAGE = 150


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def places(page: str) -> set[str]:
    """What `#...` behind the name of a page may be."""
    headings = re.findall(r"^#+ (.*)$", without_code(text_of(page)), re.MULTILINE)
    named = set(re.findall(r'<a id="(.*?)"', text_of(page)))
    return named | {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, place = target.partition("#")
        there = os.path.normpath(Path(page).parent / path) if path else page
        if not (ROOT / there).exists() or (place and place not in places(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_paragraphs_are_short(page):
    """Items of lists count as paragraphs; rows of tables do not."""
    blocks = re.split(r"\n\s*\n|\n(?=(?:\* |\d+\. |\|))", without_code(text_of(page)))
    long = [b.strip() for b in blocks if len(b.strip()) > LONGEST_PARAGRAPH]
    assert [b[:60] for b in long if not b.startswith("|")] == []


def test_every_file_says_what_it_is_for():
    """In its first lines; files of tests say there what they prove."""
    files = [path for top in (*ROOMS, "tests") for path in (ROOT / top).rglob("*.py")]
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.name != "__init__.py"
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_the_first_page_is_short():
    assert len(text_of("README.md").splitlines()) <= LONGEST_FIRST_PAGE


@pytest.mark.parametrize("top", ROOMS)
def test_every_room_has_a_page_that_lists_its_files(top):
    missing = []
    for folder in (ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())):
        names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        if len(names) < 2:
            continue
        page = folder / "README.md"
        said = page.read_text(encoding="utf-8") if page.exists() else ""
        missing += [f"{page.relative_to(ROOT)}: {n}" for n in sorted(names) if n not in said]
        listed = re.findall(r"^(\w+\.py)  ", said, re.MULTILINE)
        missing += [f"{page.relative_to(ROOT)}: no {n} here" for n in set(listed) - names]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_recipes_are_there(page):
    text = text_of(page)
    modules = set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    launched = re.findall(r"(?<!\w)deepspeed (?:--\S+ ).*", text)
    assert all(line.startswith("deepspeed --quiet ") for line in launched if "--module" in line)
    recipes = set(re.findall(r"`((?:internimage|digits|git|m3i)_[a-z0-9_]+)`", text))
    assert [name for name in recipes if not (SHIPPED / f"{name}.yaml").is_file()] == []


@pytest.mark.parametrize(
    ("page", "tool", "shown_as"),
    [
        ("tools/make_shards/README.md", make_shards, "make_shards {} "),
        ("tools/shards/README.md", shards, "| `{} "),
    ],
)
def test_every_command_is_shown(page, tool, shown_as):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        tool.main(["--help"])
    commands = re.search(r"\{([a-z0-9_,]+)\}", shown.getvalue())[1].split(",")
    assert len(commands) >= 10
    assert [name for name in commands if shown_as.format(name) not in text_of(page)] == []


def test_the_dcnv3_example_runs():
    examples = re.findall(
        r"^```python\n(.*?)^```$", text_of("pretrain/models/operators/README.md"), re.M | re.S
    )
    (example,) = (code for code in examples if "DCNv3(" in code)
    names: dict = {}
    exec(example, names)
    gradients = {name: p.grad for name, p in names["mixer"].named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["output_proj.weight"].abs().sum() > 0
