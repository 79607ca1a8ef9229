"""What entry points say at once: --help and wrong arguments, before torch is imported."""

import json
import subprocess
import sys

import pytest
from torch import nn

from pretrain import __main__ as look
from pretrain.recipe_checks import TAKEN_NAMES

QUICK = [
    ("pretrain.__main__", ["--help"], 0),
    ("pretrain.__main__", ["recipes"], 0),
    ("pretrain.__main__", ["check", "--help"], 0),
    ("pretrain.__main__", ["show", "git_digits"], 0),
    ("pretrain.__main__", ["show", "git_digits", "stepz=3"], 2),
    ("pretrain.__main__", ["check", "no_such_recipe"], 2),
    ("pretrain.__main__", ["chck"], 2),
    ("pretrain.train", ["--help"], 0),
    ("pretrain.train", ["--no-such-option"], 2),
    ("pretrain.train", ["git_digits", "steps=many"], 2),
    ("pretrain.train", ["--resume", "/no/such/run"], 2),
]
SLOW_MODULES = ("torch", "deepspeed", "transformers")

_RUN = """
import contextlib, importlib, io, json, os, sys
found = []
for module, arguments, _ in json.loads(sys.argv[1]):
    said = io.StringIO()
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = importlib.import_module(module).main(arguments)
        except SystemExit as end:
            code = end.code or 0
    found.append([code, len(said.getvalue()), [m for m in %r if m in sys.modules]])
print(json.dumps(found))
""" % (SLOW_MODULES,)  # noqa: UP031 (braces)


def test_first_words_need_no_torch():
    """All in one process, in which nothing may have imported it in the end."""
    answer = subprocess.run([sys.executable, "-c", _RUN, json.dumps(QUICK)], capture_output=True,
                            text=True, timeout=120)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    for case, (code, said, slow) in zip(QUICK, json.loads(answer.stdout), strict=True):
        assert code == case[2] and said > 20, case
        assert slow == [], case


def test_names_that_torch_takes():
    """`TAKEN_NAMES` stands for what the installed torch's ModuleDict has."""
    public = {name for name in dir(nn.ModuleDict) if not name.startswith("_")}
    assert public <= TAKEN_NAMES


@pytest.mark.parametrize("words", [
    ["check", "m3i_digits", "--world", "2", "seed=1", "steps=70"],
    ["check", "--world", "2", "m3i_digits", "seed=1", "steps=70"],
    ["check", "m3i_digits", "seed=1", "--world", "2", "steps=70"],
])  # fmt: skip
def test_overrides_and_options_in_any_order(words):
    found = look._parse(words)
    assert (found.recipe, found.overrides, found.world) == ("m3i_digits", ["seed=1", "steps=70"], 2)
