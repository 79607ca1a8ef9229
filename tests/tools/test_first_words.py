"""What entry points say at once: --help and wrong arguments, before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pretrain import __main__ as look
from pretrain import train
from pretrain.recipe.checks import TAKEN_NAMES
from tools.benchmark.__main__ import BENCHMARKS
from tools.omnipretrain import MODULES

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
ROOT = Path(__file__).parents[2]
# Arguments that lack something, or of which one is wrong; of every tool.
WRONG = {
    "benchmark": ["no_such_benchmark"],
    "compare_mixers": [],
    "compare_tasks": ["--steps", "x"],
    "convert": ["export-graph", "--out", "x.onnx"],
    "demo": ["--no-such-option"],
    "fetch_checkpoint": [],
    "evaluate": ["export", "--shards", "x", "--metrics", "beauty"],
    "finetune": ["classify", "run", "--data", "x"],
    "make_shards": ["coco"],
    "omnipretrain": ["chekc"],
    "probe": ["run", "--train", "x"],
    "selfcheck": ["--world", "0"],
    "shards": ["repack"],
    "train_tokenizer": ["out"],
    "watch_memory": [],
}
HELP = [
    *(
        ("convert", command)
        for command in (
            "export-git",
            "import-git",
            "import-internimage",
            "export-internimage",
            "export-graph",
            "export-weights",
        )
    ),
    *(("finetune", kind) for kind in ("classify", "caption")),
    *(("make_shards", source) for source in ("scenes", "folder", "coco", "table", "voc", "text")),
    *(("benchmark", name) for name in BENCHMARKS),
    *(("omnipretrain", verb) for verb in MODULES),
    *(("shards", command) for command in ("verify", "stats", "sheet", "repack", "plan", "bench")),
]
TOOLS = {
    path.stem: f"tools.{path.stem}"
    for path in (ROOT / "tools").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
}
TOOLS |= {
    path.parent.name: f"tools.{path.parent.name}.__main__"
    for path in (ROOT / "tools").glob("*/__main__.py")
}
QUICK += [(module, ["--help"], 0) for module in TOOLS.values()]
QUICK += [(TOOLS[tool], [command, "--help"], 0) for tool, command in HELP]
QUICK += [(TOOLS[tool], words, 2) for tool, words in WRONG.items()]
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
    answer = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(QUICK)], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    for case, (code, said, slow) in zip(QUICK, json.loads(answer.stdout), strict=True):
        assert code == case[2] and said > 20, case
        assert slow == [], case


def test_every_tool_is_asked_for_nonsense():
    assert sorted(WRONG) == sorted(TOOLS)


def test_names_that_torch_takes():
    """`TAKEN_NAMES` stands for what the installed torch's ModuleDict has."""
    public = {
        name
        for name in dir(nn.ModuleDict)
        if not name.startswith("_")
        # transformers adds methods to all modules, once it is asked for DeepSpeed
        and getattr(getattr(nn.ModuleDict, name), "__module__", "torch").startswith("torch")
    }
    assert public <= TAKEN_NAMES


@pytest.mark.parametrize(
    "words",
    [
        ["check", "m3i_digits", "--world", "2", "seed=1", "steps=70"],
        ["check", "--world", "2", "m3i_digits", "seed=1", "steps=70"],
        ["check", "m3i_digits", "seed=1", "--world", "2", "steps=70"],
    ],
)
def test_overrides_and_options_in_any_order(words):
    found = look._parse(words)
    assert (found.recipe, found.overrides, found.world) == ("m3i_digits", ["seed=1", "steps=70"], 2)


@pytest.mark.parametrize(
    "arguments, of_other_nodes",
    [
        (["--no-such-option"], []),
        (["git_digits", "--from-step", "3"], []),
        ([], []),
        (["git_digits", "stepz=3"], ["2"]),
        (["no_such_recipe"], ["2"]),
    ],
)
def test_what_is_wrong_is_said_once(arguments, of_other_nodes, monkeypatch, capsys):
    """Two nodes of two ranks: rank 0 speaks; of another node one, later, of what it alone may
    have, such as its files."""
    monkeypatch.setattr(train, "RANK_0_FIRST_S", 0.0)
    said = {}
    for rank in range(4):
        places = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        assert train.main(arguments) == train.WRONG_USAGE
        said[str(rank)] = capsys.readouterr().err
    assert said["0"] and [rank for rank in said if rank > "0" and said[rank]] == of_other_nodes


def test_sizes_without_the_tokenizer(tmp_path, capsys):
    """`check` names what is missing, and what the model would be with an assumed vocabulary."""
    found = {}
    for name in ("git_base", "m3i_digits"):
        assert look.main(["check", name, f"tokenizer.path={tmp_path}/none"]) == 1
        found[name] = capsys.readouterr().out
        assert "FAULT tokenizer" in found[name]
        assert "ok    model: without the tokenizer, sizes are those with an assumed" in found[name]
        assert "ok    memory per rank: about" in found[name]
    assert "ok    model: 15" in found["git_base"]  # 129 M beside the words, 23 M of them
