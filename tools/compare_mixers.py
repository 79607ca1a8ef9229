"""InternImage against the same with a depth-wise convolution, and against ViTs of equal size.

    python -m tools.compare_mixers --images FOLDER          # one sub-folder a class
    python -m tools.compare_mixers --scenes 12000           # digit scenes, no input needed

Packs the pictures, a tenth of them held out, trains `internimage_small` in each way with every
seed, and writes OUT/table.md and OUT/curves.png: accuracy on held-out pictures, mean and standard
deviation over the seeds. A run that has finished is not repeated, so the command continues where it
was stopped.
"""

import argparse
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from data_pipeline.console import parse_in_any_order, write_utf8
from pretrain.recipe.overlay import RecipeError
from tools.support.experiment import (
    Plan,
    Run,
    describe,
    evaluations,
    markdown,
    metrics,
    slug,
    train,
)
from tools.support.line_chart import Line, Panel, line_chart

console = Console(soft_wrap=True)
RECIPE = "internimage_small"
TASK = "classify"
# Each has within 5 % of InternImage's parameters. The MLP of the convolution's layers is wider for
# what offsets and masks take there. The ViT with patches of 16 pixels has 1.3 times the FLOPs of
# InternImage; the one with patches of 8 pixels five times.
_VIT = (
    "type: vit, image_size: SIDE, width: 144, layers: 7, heads: 9, activation: gelu, "
    "position_std: 0.5"
)
WAYS: dict[str, tuple[str, ...]] = {
    "InternImage (DCNv3)": (),
    "depth-wise convolution 7x7": (
        "model.encoders.image.mixer={type: depthwise_conv, kernel_size: 7}",
        "model.encoders.image.mlp_ratio=4.75",
    ),
    "ViT, patches of 16": (f"model.encoders.image={{{_VIT}, patch_size: 16}}",),
    "ViT, patches of 8": (f"model.encoders.image={{{_VIT}, patch_size: 8}}",),
}
# Neither a mirrored digit nor one that is cut off is what its label says.
_SCENES = ("scale=[0.9, 1.0]", "ratio=[1.0, 1.0]", "flip_probability=0.0")
_HELD_OUT_SCENES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    write_utf8()
    options = parse_arguments(argv)
    try:
        classes = pack(options)
        runs = plan(options, classes)
    except subprocess.CalledProcessError as error:
        console.print(
            f"cannot pack the pictures: {(error.stderr or '').strip()}", style="red", markup=False
        )
        return 1
    except RecipeError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    failed = train(runs, options.jobs, console)
    if failed:
        console.print(f"[red]{len(failed)} runs failed[/]: {', '.join(failed)}; see their .log")
        return 1
    text = table(runs)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    curves(runs).save(options.out / "curves.png")
    console.print(text, markup=False, highlight=False)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="tools.compare_mixers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder with a sub-folder for each class")
    source.add_argument(
        "--scenes", type=int, metavar="N", help="generate so many digit scenes instead"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/mixers"),
        help="shards, run directories and results; another one for each data set "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=list(WAYS),
        metavar="WAY",
        help="only these: " + ", ".join(repr(way) for way in WAYS),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of each run (default %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, one thread each (default %(default)s)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key.path=value",
        help="changes of the recipe, for all ways",
    )
    return parse_in_any_order(parser, argv)


# ---- data ----------------------------------------------------------------------------------------


def pack(options: argparse.Namespace) -> int:
    """Shards under OUT/data, unless they are there; returns the number of classes.

    Raises:
        subprocess.CalledProcessError: a tool has failed; `stderr` holds what it said.
    """
    from data_pipeline.shards.manifest import Manifest

    data = options.out / "data"
    if options.scenes:
        for split, count in (("train", options.scenes), ("heldout", _HELD_OUT_SCENES)):
            call(
                "make_shards",
                "scenes",
                "--out",
                data,
                "--split",
                split,
                "--count",
                count,
                "--two-digit-share",
                0,
            )
    elif not (data / "heldout").is_dir():
        call("make_shards", "folder", "--out", data / "all", "--images", options.images)
        call(
            "shards",
            "repack",
            data / "all" / "train",
            "--out",
            data,
            "--fractions",
            "train=0.9,heldout=0.1",
        )
    return len(Manifest.load(data / "train").classes or ())


def call(tool: str, *arguments: object) -> None:
    """Run a tool of ours quietly."""
    command = [sys.executable, "-m", f"tools.{tool}", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")


def plan(options: argparse.Namespace, classes: int) -> Plan:
    """Every way with every seed.

    Raises:
        RecipeError: `--set` does not fit, or a run directory is that of another comparison.
    """
    from pretrain.recipe.load import load_recipe, load_resolved

    data = options.out / "data"
    side = 32 if options.scenes else 64
    common = [
        f"tasks.{TASK}.data.image.size={side}",
        f"steps={options.steps}",
        f"tasks.{TASK}.data.shards=[{data / 'train'}]",
        f"tasks.{TASK}.data.classes={classes}",
        f"tasks.{TASK}.evaluation.shards=[{data / 'heldout'}]",
        *(f"tasks.{TASK}.data.image.{change}" for change in (_SCENES if options.scenes else ())),
        *options.set,
    ]
    runs: Plan = {}
    for seed in options.seeds:
        for way in options.ways:
            folder = options.out / f"{slug(way)}-seed{seed}"
            own = (*changes(way, side), f"seed={seed}", f"run_dir={folder}")
            runs[folder] = Run(way, RECIPE, [*common, *own])
            recipe = load_recipe(RECIPE, runs[folder].overrides)
            if (old := folder / "recipe.yaml").exists() and load_resolved(old) != recipe:
                raise RecipeError(f"{folder} holds a run of other settings: give another --out")
    return runs


def changes(way: str, side: int) -> list[str]:
    """What makes the encoder of the recipe that of `way`, for images of `side` pixels."""
    return [change.replace("SIDE", str(side)) for change in WAYS[way]]


# ---- results -------------------------------------------------------------------------------------


def table(runs: Plan) -> str:
    """Markdown: size, and top-1 on held-out pictures at the end."""
    values: dict[str, list[float]] = defaultdict(list)
    sizes = {}
    for folder, run in runs.items():
        found = evaluations(folder)
        if TASK in found:
            values[run.way].append(found[TASK]["top1"])
            sizes.setdefault(run.way, size_of(run))
    return markdown(
        ["parameters", "MFLOPs an image", "top-1, held out"],
        [
            [way, f"{sizes[way][0] / 1e6:.2f} M", f"{sizes[way][1] / 1e6:.0f}", describe(found)]
            for way, found in values.items()
        ],
    )


def size_of(run: Run) -> tuple[int, int]:
    """Parameters of the encoder of a run, and its FLOPs for one image."""
    import torch  # --help and wrong arguments do without

    from pretrain.recipe.load import load_recipe

    recipe = load_recipe(run.recipe, run.overrides)
    with torch.device("meta"):
        encoder = recipe.model.encoders["image"].build()
    side = recipe.tasks[TASK].data.image.size
    return sum(p.numel() for p in encoder.parameters()), encoder.flops(side, side)


def curves(runs: Plan):
    """Loss in training and accuracy on held-out pictures: means over seeds in a band from the
    lowest to the highest."""
    ways: dict[str, list[list[dict]]] = defaultdict(list)
    for folder, run in runs.items():
        ways[run.way].append(metrics(folder))
    panels = [
        Panel("cross-entropy in training", [line(way, logs, losses) for way, logs in ways.items()]),
        Panel("top-1 on held-out pictures", [line(way, logs, hits) for way, logs in ways.items()]),
    ]
    return line_chart(panels, x_title="step")


def losses(log: list[dict]) -> dict[int, float]:
    """Step of an evaluation -> mean loss of the logged steps since the one before."""
    found: dict[int, float] = {}
    since: list[float] = []
    for row in log:
        if row["kind"] == "train":
            since.append(row["cross_entropy"])
        elif since:
            found[row["step"]] = statistics.mean(since)
            since = []
    return found


def hits(log: list[dict]) -> dict[int, float]:
    """Step of an evaluation -> its accuracy."""
    return {row["step"]: row["top1"] for row in log if row["kind"] == "evaluation"}


def line(way: str, logs: Sequence[list[dict]], values: Callable[[list[dict]], dict]) -> Line:
    """The curve of a way over its seeds."""
    found = [values(log) for log in logs]
    steps = [step for step in found[0] if all(step in one for one in found)]
    columns = [[one[step] for one in found] for step in steps]
    return Line(
        way,
        steps,
        [statistics.mean(c) for c in columns],
        [min(c) for c in columns],
        [max(c) for c in columns],
    )


if __name__ == "__main__":
    sys.exit(main())
