"""Measure this project against what else there is, on your machine.

    python -m tools.benchmark checkpoint
    python -m tools.benchmark data --images photos/
    python -m tools.benchmark decode
    python -m tools.benchmark git --json git.json
    python -m tools.benchmark engine
    python -m tools.benchmark dcnv3
    python -m tools.benchmark deform_attn
    python -m tools.benchmark gpu
    python -m tools.benchmark kernels
    python -m tools.benchmark remote
    python -m tools.benchmark memory
    python -m tools.benchmark optimizer

Ratios compare cases of the same run, which take turns; figures are medians of at least five
repetitions, unless these take longer than five minutes: then the result says how many there were.
`--long` takes all of them, as the figures in README.md beside this file did. Each case is said as
it is measured.

Each benchmark is a module `tools/benchmark/<name>.py` with `run(args) -> dict`, its arguments in
`tools/benchmark/arguments.py`:

    title: str
    rows:  list of dicts with equal keys; the keys become the columns of the table
    bars:  list of {"what": str, "measured": float, "bar": float, "at_least": bool}
    notes: list of str (optional)
"""

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.console import parse_in_any_order, write_utf8
from tools.benchmark.arguments import ARGUMENTS
from tools.support.measure import LEAST_REPEATS, end_after, machine, say, shortened

_MINUTES = 5
# Of this time what is measured in turns may take; the rest is for what comes before and behind.
_SHARE = 0.7
BENCHMARKS = {
    "checkpoint": "saving: how long training stands still, against DeepSpeed and async_save",
    "data": "loading images: against webdataset, and against the limit set by decoding",
    "decode": "large photographs: decoding at a fraction of their size, speed and fidelity",
    "git": "the captioning model: against transformers, with one and five captions an image",
    "engine": "the training loop: against the bare DeepSpeed engine on the same work",
    "gpu": "DCNv3 and InternImage on one GPU: against the speed of its memory and of its products",
    "kernels": "Triton kernels, counted in machine code without a GPU: limits by instructions",
    "dcnv3": "DCNv3 on the CPU: against the formulation with grid_sample",
    "deform_attn": "multi-scale deformable attention on the CPU: against transformers",
    "remote": "shards on a server that takes 50 ms to answer: how long the trainer waits for them",
    "memory": "the loader: memory of all its processes over three epochs, also of 10**8 rows",
    "optimizer": "MT-AdamW: time and temporary memory of a step against torch's AdamW",
}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    write_utf8()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--repeats", type=int, default=7, help="repetitions, 5 or more")
        command.add_argument(
            "--long", action="store_true", help="all repetitions, also if they take hours"
        )
        command.add_argument("--json", type=Path, help="also write the result to this file")
        ARGUMENTS[name](command)
    options = parse_in_any_order(parser, arguments)
    if options.repeats < LEAST_REPEATS:
        parser.error(f"--repeats {options.repeats}: at least {LEAST_REPEATS}")

    end = "until all repetitions are done" if options.long else f"about {_MINUTES} minutes at most"
    say(f"{options.benchmark}: {BENCHMARKS[options.benchmark]}; {end}")
    end_after(None if options.long else 60 * _MINUTES * _SHARE)
    described = machine(shlex.join(["python", "-m", "tools.benchmark", *arguments]))
    result = importlib.import_module(f"tools.benchmark.{options.benchmark}").run(options)
    result["notes"] = [*result.get("notes", []), *shortened()]
    show(result, described)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result, "machine": described}, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")
    return 0


def show(result: dict[str, Any], described: dict[str, Any]) -> None:
    """Print rows, bars, notes and the machine."""
    # Files and pipes have no width; 80 columns would break every name.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(_rows_table(result))
    if result.get("bars"):
        console.print(_bars_table(result["bars"]))
    for note in result.get("notes", []):
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    libraries = ", ".join(f"{name} {version}" for name, version in described["libraries"].items())
    console.print(
        f"{described['command']}\n{described['cpu']}, {described['usable_cores']} usable cores, "
        f"load {described['load_average']}; Python {described['python']}, {libraries}; "
        f"commit {described['commit']}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def met(bar: dict[str, Any]) -> bool:
    """Whether a measured figure reaches its bar."""
    if bar["at_least"]:
        return bar["measured"] >= bar["bar"]
    return bar["measured"] <= bar["bar"]


def _rows_table(result: dict[str, Any]) -> Table:
    table = Table(title=result["title"])
    columns = list(result["rows"][0])
    for column in columns:
        numeric = all(isinstance(row[column], int | float | None) for row in result["rows"])
        table.add_column(column, justify="right" if numeric else "left")
    for row in result["rows"]:
        table.add_row(*(_text(row[column]) for column in columns))
    return table


def _bars_table(bars: list[dict[str, Any]]) -> Table:
    table = Table(title="bars")
    for column in ("what", "measured", "bar", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for bar in bars:
        sign = "at least" if bar["at_least"] else "at most"
        verdict = "[green]met[/]" if met(bar) else "[red]missed[/]"
        table.add_row(bar["what"], _text(bar["measured"]), f"{sign} {_text(bar['bar'])}", verdict)
    return table


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
