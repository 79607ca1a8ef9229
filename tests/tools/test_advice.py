"""What messages and pages recommend exists: modules, commands, options, keys of recipes, variables,
packages.

Messages whose advice is done, step by step, are tested beside what says them.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.recipe.former_keys import FORMER_KEYS
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schema import reference
from slurm.drill import FAULTS

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path for room in ("pretrain", "data_pipeline", "tools") for path in (ROOT / room).rglob("*.py")
]
PAGES = [
    page
    for room in (".", "pretrain", "data_pipeline", "tools", "ds_configs", "slurm", "tests")
    for page in (ROOT / room).glob("*.md" if room == "." else "**/*.md")
]
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
FIELDS = [field.path.split(".") for field in reference(Recipe)]

# Of launchers, shells and drivers, whose own pages have them.
FOREIGN_OPTIONS = {
    "--nproc-per-node",
    "--num",
    "--ntasks-per-node",
    "--untracked-files",
    "--gpus-per-task",
    "--cpus-per-task",
    "--numa-binding",
    "--distribution",
    "--master",
    "--sort",
    "--logdir",
    "--no-build-isolation",
    "--ignore-zeros",
    "--help",
    "--local",
    "--nnodes",
    "--cpu",
    "--max-restarts",
    "--standalone",
    "--multi",
    "--mixed",
    "--dynamo",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--gpus-per-node",
    "--gpu-bind",
    "--kill-on-bad-exit",
    "--hostfile",
    "--prefix",
    "--output",
}
FOREIGN_VARIABLES = {
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "FSSPEC_S3_ANON",
    "LC_ALL",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONUTF8",
    "CXX",
    "TRITON_INTERPRET",
}

FOREIGN_KEYS = {"checkpoint.tag_validation"}  # DeepSpeed's


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every string, what is filled in is `{}`; and of the lines of pages."""
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
            yield f"{page.relative_to(ROOT)}:{number}", line
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


MESSAGES = list(messages())


def missing(pattern: str, exists) -> list[str]:
    return [
        f"{place}: {match[0]}"
        for place, text in MESSAGES
        for match in re.finditer(pattern, text)
        if not exists(*match.groups())
    ]


def test_modules_and_commands():
    commands = set(re.findall(r'"([a-z][a-z0-9-]*)"', SOURCE))

    def exists(module: str, command: str | None) -> bool:
        module = module.rstrip(".")
        found = importlib.util.find_spec(module) is not None
        takes_commands = module in ("tools.convert", "tools.shards", "tools.make_shards")
        return found and (not command or not takes_commands or command in commands)

    assert not missing(r"python -m ([a-z][\w.]+)(?: ([a-z][a-z-]+)\b)?", exists)


def test_options():
    files = [*(ROOT / "slurm").glob("*.py"), *(ROOT / "tests" / "slurm").glob("*.py")]
    cluster = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = re.findall(r'"(--[a-z][a-z0-9_-]*)"', SOURCE + cluster)
    own = {option.replace("_", "-") for option in named} | {f"--{fault}" for fault in FAULTS}
    assert not missing(
        r"(?<![\w-])(--[a-z][a-z0-9-]+)", lambda option: option in own | FOREIGN_OPTIONS
    )


def test_keys_of_recipes():
    tops = "|".join(sorted({field[0] for field in FIELDS} - {"model", "schedule", "tokenizer"}))

    def exists(key: str) -> bool:
        names = key.split(".")
        return importlib.util.find_spec(names[0]) is not None or any(
            len(field) >= len(names)
            and all(
                have == name or have.startswith("<") or name in ("{}", "*", "%s")
                for have, name in zip(field, names, strict=False)
            )
            for field in FIELDS
        )

    part = r"(?:[a-z_0-9]+|\{\}|\*|%s)"
    names = rf"(?<![\w.}}/-])((?:{tops})(?:\.{part})+)(?![\w.(*])"
    assert not missing(
        names,
        lambda key: (
            exists(key)
            or key.endswith((".h", ".md", ".py"))
            or key in FOREIGN_KEYS
            or key in {former.path for former in FORMER_KEYS}
        ),
    )


def test_environment_variables():
    read = set(re.findall(r'"([A-Z][A-Z_0-9]+)"', SOURCE)) | FOREIGN_VARIABLES
    assert not missing(r"\bset ([A-Z][A-Z0-9]*_[A-Z0-9_]+)", lambda name: name in read)


def test_packages_are_those_of_the_project():
    """By their own names: the project itself is on no index."""
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + "DCNv4 s3fs gcsfs adlfs"
    assert not missing(
        r"pip install (?:--[a-z-]+ )*'?([\w.\[\]-]+)",
        lambda name: re.search(rf"\b{name}\b", known) is not None and "[" not in name,
    )


def test_engine_settings():
    assert not missing(
        r"\b(zero[0-9]_[a-z0-9_]+)", lambda name: (ROOT / "ds_configs" / f"{name}.json").is_file()
    )


def test_the_search_finds_what_is_wrong(monkeypatch):
    monkeypatch.setitem(globals(), "MESSAGES", [("x.py:1", "run python -m tools.nothing there")])
    with pytest.raises(AssertionError, match="nothing"):
        test_modules_and_commands()
    monkeypatch.setitem(globals(), "MESSAGES", [("x.py:1", "use --no-such-thing, optimizer.rate")])
    with pytest.raises(AssertionError, match="no-such-thing"):
        test_options()
    with pytest.raises(AssertionError, match=r"optimizer\.rate"):
        test_keys_of_recipes()
