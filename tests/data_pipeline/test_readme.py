"""The page for users names all that there is, and its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from tools.make_shards import __main__ as make_shards
from tools.shards import __main__ as shards

ROOM = Path(__file__).parents[2] / "data_pipeline"
TEXT = (ROOM / "README.md").read_text(encoding="utf-8")


def test_every_file_is_listed():
    names = {path.name for path in ROOM.rglob("*.py")} - {"__init__.py"}
    listed = re.findall(r"\b\w+\.py\b", TEXT[TEXT.index("\n## Files\n") :])
    assert names <= set(listed)
    assert {name for name in listed if name.startswith("test_")} | names == set(listed)


def test_links_lead_somewhere():
    places = set(re.findall(r'<a id="(.*?)"', TEXT))
    for heading in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE):
        places.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", TEXT)
    assert len(links) > 50
    for path, place in links:
        assert (ROOM / path).exists() if path else place in places, (path, place)


@pytest.mark.parametrize("tool", [make_shards, shards])
def test_every_command_is_shown(tool):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        tool.main(["--help"])
    commands = re.search(r"\{([a-z0-9_,]+)\}", shown.getvalue())[1].split(",")
    assert len(commands) >= 10
    table = "| `" if tool is shards else "make_shards "
    assert [name for name in commands if f"{table}{name} " not in TEXT] == []
