"""One word for all commands: `omnipretrain VERB ...` is `python -m MODULE ...`.

recipes, check and show look at a recipe, train trains it; pack, shards and tokenize prepare data;
convert, evaluate and probe go on with what was trained; submit, status and their like work on a
cluster. `omnipretrain VERB --help` says more of each.
"""

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "a recipe": {
        "recipes": ("pretrain", "list the shipped recipes"),
        "show": ("pretrain", "print a recipe with all its fields"),
        "check": ("pretrain", "every mistake in a recipe, before anything starts"),
        "train": ("pretrain.train", "train it, on this process or those of a launcher"),
    },
    "data": {
        "pack": ("tools.make_shards", "pack images, tables or documents into shards"),
        "shards": ("tools.shards", "verify, inspect, filter, split and serve shards"),
        "tokenize": ("tools.train_tokenizer", "train a tokenizer on the captions of shards"),
    },
    "what was trained": {
        "convert": ("tools.convert", "weights to and from the formats of others"),
        "finetune": ("tools.finetune", "to labels or captions, for from_pretrained"),
        "evaluate": ("tools.evaluate", "what a model knows: captions, classes, retrieval"),
        "probe": ("tools.probe", "nearest neighbours and a linear probe of an encoder"),
        "fetch-checkpoint": ("tools.fetch_checkpoint", "bring a copied checkpoint back"),
    },
    "this machine": {
        "benchmark": ("tools.benchmark", "measure speed and memory against other programs"),
        "selfcheck": ("tools.selfcheck", "is the installed DeepSpeed safe for several tasks?"),
        "compare-tasks": ("tools.compare_tasks", "tasks together, mixed, balanced and alone"),
        "compare-mixers": ("tools.compare_mixers", "InternImage against its like"),
        "demo": ("tools.demo", "from no data to captions, in minutes"),
    },
    "a cluster": {
        "submit": ("slurm.submit", "start a run under SLURM, or go on with it"),
        "status": ("slurm.status", "how runs stand"),
        "logs": ("slurm.logs", "what a run says"),
        "save": ("slurm.save", "a checkpoint now"),
        "stop": ("slurm.stop", "save, then end"),
        "cancel": ("slurm.cancel", "end the jobs of a run now"),
        "drill": ("slurm.drill", "do to a running job what a cluster may"),
        "supervise": ("slurm.supervise", "keep a run going, without SLURM too"),
    },
}
"""Verb -> its module, and what it does."""

MODULES = {verb: module for verbs in GROUPS.values() for verb, (module, _) in verbs.items()}
_OF_SEVERAL_VERBS = "pretrain"
"""Takes the verb as its first word; the other modules have one verb each."""
_COMMANDS_BY_WORD = "tools.shards"
"""Builds the parser of the command that it is called with only."""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns or exits with the code of the command."""
    words = list(sys.argv[1:] if words is None else words)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        from pretrain import __version__

        print(f"omnipretrain {__version__}")
        return 0
    if verb not in MODULES:
        print(f"omnipretrain: {_unknown(verb)}", file=sys.stderr)
        return 2
    _run(MODULES[verb], [verb, *rest] if MODULES[verb] == _OF_SEVERAL_VERBS else rest)
    return 0


def _run(module: str, words: list[str]) -> None:
    """What `python -m` does: the module runs as `__main__`, and finds its words in sys.argv."""
    sys.argv = [module, *words]  # the path of the module takes the first place
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _help() -> str:
    lines = ["usage: omnipretrain VERB ...", "", __doc__ or ""]
    for group, verbs in GROUPS.items():
        lines.append(f"{group}:")
        for verb, (module, what) in verbs.items():
            words = f"{module} {verb}" if module == _OF_SEVERAL_VERBS else module
            lines.append(f"  {verb:<17} {what} (python -m {words})")
    lines += ["", 'Tab completion (bash, zsh): eval "$(register-python-argcomplete omnipretrain)"']
    return "\n".join(lines)


def _unknown(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, MODULES, n=1)
    hint = f"did you mean {near[0]}?" if near else "omnipretrain --help lists them"
    return f"no such verb: {verb}; {hint}"


# ---- tab completion ----------------------------------------------------------------------------


def _complete() -> NoReturn:
    """Say what may come next on the line that the shell is asking about, and exit.

    The verb comes from here, all else from the parser of its module, which is caught on its way to
    reading the command line.
    """
    from argcomplete.lexers import split_line

    line, place = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    before = split_line(line, place)[3]  # the words in front of the one that is being typed
    module = MODULES.get(before[1]) if len(before) > 1 else None
    if module is None:
        parser = argparse.ArgumentParser(prog="omnipretrain")
        parser.add_argument("verb", choices=MODULES)
        _offer(parser)
    if module != _OF_SEVERAL_VERBS:  # which word of the line is the program's name, from 1 on
        os.environ["_ARGCOMPLETE"] = "2"

    from data_pipeline import console

    console.parse_in_any_order = _offer
    argparse.ArgumentParser.parse_args = _offer
    argparse.ArgumentParser.parse_intermixed_args = _offer
    _run(module, before[2:3] if module == _COMMANDS_BY_WORD else [])
    raise SystemExit(f"{module} reads no command line")


def _offer(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
    import argcomplete

    argcomplete.autocomplete(parser, default_completer=_values)
    raise SystemExit(1)


def _values(prefix: str, action: argparse.Action, **_: Any) -> Iterable[str]:
    """Values of an argument that has no choices: names of recipes, and files."""
    from argcomplete.completers import FilesCompleter

    found = list(FilesCompleter()(prefix))
    if action.dest == "recipe":
        folder = Path(importlib.util.find_spec("pretrain").submodule_search_locations[0])
        found += sorted(path.stem for path in (folder / "recipes").glob("*.yaml"))
    return found


if __name__ == "__main__":
    sys.exit(main())
