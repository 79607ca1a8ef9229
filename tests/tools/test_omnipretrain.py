"""`omnipretrain VERB` is the module's own command line, starts at once, and completes its words."""

import argparse
import functools
import io
import os
import re
import resource
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import argcomplete
import pytest

import pretrain
from data_pipeline import console
from pretrain import __main__ as look
from tools import omnipretrain

ROOT = Path(__file__).parents[2]
# Modules that other tests have imported run once more here.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def test_the_script_is_declared_and_the_version_is_one():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared["project"]["scripts"] == {"omnipretrain": "tools.omnipretrain:main"}
    assert declared["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "pretrain.__version__"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == pretrain.__version__
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pretrain.__version__}\n" in cited


def test_every_verb_runs_its_module_with_its_words(monkeypatch):
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda m, **how: ran.append((m, sys.argv[1:], how)))
    monkeypatch.setattr(sys, "argv", [])
    for verb, module in omnipretrain.MODULES.items():
        omnipretrain.main([verb, "one", "--two"])
        words = ["one", "--two"]
        as_main = {"run_name": "__main__", "alter_sys": True}
        assert ran.pop() == (module, [verb, *words] if module == "pretrain" else words, as_main)


def test_the_same_words_and_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    for words in (["recipes"], ["show", "git_digits"], ["show", "git_digits", "stepz=3"]):
        code = look.main(words)
        said = capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            omnipretrain.main(words)
        assert (end.value.code, capsys.readouterr()) == (code, said)


def test_unknown_verbs(capsys):
    assert omnipretrain.main(["chekc"]) == 2
    assert "did you mean check?" in capsys.readouterr().err
    assert omnipretrain.main([]) == 2
    assert omnipretrain.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in omnipretrain.MODULES if f"  {verb} " not in shown] == []


def test_it_starts_at_once():
    """Half a second of CPU is what a person does not notice."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "tools.omnipretrain", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "register-python-argcomplete" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def no_debugging(number, *mode, fdopen=os.fdopen):
    if number == 9:
        raise OSError("no descriptor for debugging")
    return fdopen(number, *mode)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("omnipretrain ", {"recipes", "check", "train", "shards", "pack", "convert", "submit"}),
        ("omnipretrain be", {"benchmark "}),
        ("omnipretrain check m3i_", {"m3i_digits", "m3i_vit_b"}),
        ("omnipretrain check git_digits --w", {"--world "}),
        ("omnipretrain train --res", {"--resume "}),
        ("omnipretrain shards ver", {"verify "}),
        ("omnipretrain shards repack data --wh", {"--where "}),
        ("omnipretrain convert import FOLDER --fr", {"--from "}),
        ("omnipretrain submit git_digits --no", {"--nodes", "--no-code-copy"}),
        ("omnipretrain submit git_digits --launcher s", {"srun "}),
        ("omnipretrain supervise --max-f", {"--max-fruitless "}),
    ],
)
def test_completion(line, offered, monkeypatch, tmp_path):
    """What a shell asks, answered by the parsers themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for owner, name in [
        (console, "parse_in_any_order"),
        (argparse.ArgumentParser, "parse_args"),
        (argparse.ArgumentParser, "parse_intermixed_args"),
    ]:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    answer = io.StringIO()
    monkeypatch.setattr(
        argcomplete,
        "autocomplete",
        functools.partial(argcomplete.autocomplete, exit_method=sys.exit, output_stream=answer),
    )
    for name, value in {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    # argcomplete takes descriptor 9 for its own and closes it; here it is one of the tests'.
    monkeypatch.setattr(os, "fdopen", no_debugging)
    with pytest.raises(SystemExit) as end:
        omnipretrain.main()
    assert end.value.code == 0
    found = set(answer.getvalue().split("\n"))
    assert offered <= found and (len(offered) > 3 or offered == found)
