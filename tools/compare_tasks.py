"""How tasks that share an encoder are best trained: unmixed or mixed, balanced or not, or alone.

    python -m tools.compare_tasks --data runs/demo/data --out runs/compare

Trains `digits_multitask` in each way with every seed, each task with the same number of
task-steps, evaluates on held-out scenes, and prints a table (also in OUT/table.md). A run that has
finished is not repeated, so the command continues where it was stopped. Needs the shards and the
tokenizer that `make demo` leaves behind.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_pipeline.console import parse_in_any_order, write_utf8
from tools.support.experiment import Plan, Run, describe, evaluations, markdown, slug, train

console = Console(soft_wrap=True)
TASKS = ("caption", "classify", "contrast")
# What is reported of each task's evaluation.
METRICS = (
    ("classify", "top1", "digit accuracy"),
    ("caption", "cider_d", "CIDEr-D"),
    ("caption", "token_accuracy", "token accuracy"),
    ("contrast", "image_to_text_r1", "image to text R@1"),
    ("contrast", "text_to_image_r1", "text to image R@1"),
)
# One rate for all of AdamW. MT-AdamW's moments estimate the sum over tasks, so its steps are about
# sqrt(3) times as long at the same rate; `--lr` tries others.
WAYS: dict[str, tuple[str, ...]] = {
    "unmixed, MT-AdamW": (
        "optimizer.kind=mt_adamw",
        "optimizer.clip_norm=null",
        "optimizer.betas=[0.9, 0.95]",
        "optimizer.lr=3.5e-4",
    ),
    "unmixed, AdamW": (),
    "mixed, AdamW": ("sampling.mode=mixed",),
    "one task alone, AdamW": (),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    write_utf8()
    parser = argparse.ArgumentParser(
        prog="tools.compare_tasks", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("runs/demo/data"),
        help="folder with train/, heldout/ and tokenizer/",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="run directories")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="steps of each task")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="RATE",
        default=None,
        help="try these learning rates instead of the recipe's",
    )
    options = parse_in_any_order(parser, argv)
    if not (options.data / "tokenizer").is_dir():
        console.print(
            f"[red]{options.data} has no tokenizer/: run `make demo` first, or give the "
            "folder that it left with --data"
        )
        return 2
    runs = plan(options)
    failed = train(runs, options.jobs, console)
    if failed:
        console.print(f"[red]{len(failed)} runs failed[/]: {', '.join(failed)}; see their log.txt")
        return 1
    text = table(runs)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def plan(options: argparse.Namespace) -> Plan:
    """Every way with every seed."""
    runs = {}
    rates = options.lr or [None]
    for way, changes in WAYS.items():
        for seed in options.seeds:
            for rate in rates:
                name = way if rate is None else f"{way}, lr {rate:g}"
                common = [*data_overrides(options.data), *changes, f"seed={seed}"]
                common += [] if rate is None else [f"optimizer.lr={rate}"]
                for label, more in variants(way, options.steps):
                    folder = options.out / f"{slug(name)}{label}-seed{seed}-steps{options.steps}"
                    overrides = without_removed([*common, *more, f"run_dir={folder}"])
                    runs[folder] = Run(name, "digits_multitask", overrides)
    return runs


def variants(way: str, steps: int) -> list[tuple[str, list[str]]]:
    """(label, overrides) of the runs that one seed of a way takes."""
    if way.startswith("one task"):
        return [
            (
                f"-{kept}",
                [
                    f"steps={steps}",
                    *(f"tasks.{task}=null" for task in TASKS if task != kept),
                    *(["model.encoders.text=null"] if kept != "contrast" else []),
                ],
            )
            for kept in TASKS
        ]
    # A mixed step runs every task once.
    return [("", [f"steps={steps if way.startswith('mixed') else steps * len(TASKS)}"])]


def without_removed(overrides: list[str]) -> list[str]:
    """Leave out settings of tasks that another override removes."""
    removed = [o.removesuffix("=null") + "." for o in overrides if o.endswith("=null")]
    return [o for o in overrides if not o.startswith(tuple(removed))]


def data_overrides(data: Path) -> list[str]:
    """Point the recipe to the folder, and evaluate at the end only."""
    return [
        f"tokenizer.path={data / 'tokenizer'}",
        "evaluation_every_steps=null",
        "deepspeed=zero1",
        "logging.tensorboard=false",
        "checkpoint.every_steps=100000",
        *(f"tasks.{t}.micro_batch=64" for t in TASKS),
        *(f"tasks.{t}.data.shards=[{data / 'train'}]" for t in TASKS),
        *(f"tasks.{t}.evaluation.shards=[{data / 'heldout'}]" for t in TASKS),
    ]


# ---- results -------------------------------------------------------------------------------------


def table(runs: Plan) -> str:
    """Markdown: a row per way, mean and standard deviation over the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    for folder, run in runs.items():
        found = evaluations(folder)
        for task, metric, title in METRICS:
            if task in found:
                values.setdefault(run.way, {}).setdefault(title, []).append(found[task][metric])
    titles = [title for _, _, title in METRICS]
    return markdown(
        titles,
        [
            [way, *(describe(columns.get(title, [])) for title in titles)]
            for way, columns in values.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
