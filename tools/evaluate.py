r"""Judge what was trained on images with captions or classes: runs, exports, transformers' folders.

    python -m tools.evaluate exports/git_base --shards data/coco/val --sheet captions.png \
        --json metrics.json
    python -m tools.evaluate runs/m3i --metrics knn,linear --train data/train --shards data/val
    python -m tools.evaluate flower_model --metrics top1,invariance --shards data/val --plot p.png
    python -m tools.evaluate exports/clip --metrics zeroshot,retrieval --prompts flowers.yaml \
        --shards data/val

Without --metrics it is `captions`: SOURCE is then a folder that `tools.convert export-git` or
`tools.finetune caption` wrote. Model, tokenizer and generation are those of transformers; only the
held-out images are prepared as in training, and the metrics are ours. A metric that does not fit
SOURCE is refused with those that do.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.console import parse_in_any_order, write_utf8
from tools.support.arguments import add_device, add_weights, device_of, positive

if TYPE_CHECKING:  # --help and wrong arguments do without torch
    from tools.convert.captioner import Evaluated
    from tools.convert.record import ExportRecord
    from tools.support.training_images import Seen

METRICS = (
    "captions",
    "knn",
    "linear",
    "top1",
    "top5",
    "zeroshot",
    "retrieval",
    "resolutions",
    "invariance",
)
_COLUMNS = 4
_SHOWN = {
    "cider_d": "CIDEr-D (0 to 10)",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "token_accuracy": "token accuracy",
    "cross_entropy": "cross-entropy (nats per token)",
    "images": "images",
}
console = Console()


# ---- output ------------------------------------------------------------------------------------


def _print_results(record: "ExportRecord", found: "Evaluated", seen: "Seen", examples: int) -> None:
    from tools.support.training_images import NAMED

    if not (record.verification and record.verification.passed):
        console.print("[yellow]this export was not verified against the run that it came from[/]")
    title = f"{record.recipe}, step {record.step}, task {record.task}"
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, label in _SHOWN.items():
        if name in found.metrics:
            value = found.metrics[name]
            table.add_row(label, f"{value:,.0f}" if name == "images" else f"{value:.4f}")
    table.add_row("captions per second", f"{len(found.examples) / found.seconds:.1f}")
    console.print(table)
    if seen in ("training", "partly training"):
        console.print(f"[yellow]these are {NAMED[seen]}: the metrics say little about others[/]")
    if found.bad_samples:
        console.print(f"[yellow]{found.bad_samples} bad samples were left out[/]")
    for example in found.examples[:examples]:
        console.print(Text(example.key, style="dim"))
        console.print(Text(f"  predicted  {example.caption or '(nothing)'}", style="blue"))
        for reference in example.references[:1]:
            console.print(Text(f"  reference  {reference}", style="green"))


def _write_json(
    path: Path, record: "ExportRecord", options: Any, found: "Evaluated", seen: "Seen"
) -> None:
    content = {
        "metrics": found.metrics,
        "export": record.model_dump(
            mode="json", include={"recipe", "step", "task", "checkpoint_sha256"}
        ),
        "generation": {"kind": "greedy", "max_new_tokens": record.max_new_tokens},
        "shards": options.shards,
        "where": options.where,
        "images": seen,
        "bad_samples": found.bad_samples,
        "captions": [
            {key: value for key, value in asdict(example).items() if key != "image"}
            for example in found.examples
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_sheet(
    path: Path, record: "ExportRecord", font: str | None, found: "Evaluated", seen: "Seen"
) -> None:
    from tools.support.contact_sheet import Cell, contact_sheet
    from tools.support.training_images import NAMED

    cells = [
        Cell(drawn[0], e.key, e.caption, e.references[:1])
        for e in found.examples
        if (drawn := e.drawn()) is not None
    ]
    metrics = found.metrics
    scores = ", ".join(
        f"{label} {metrics[name]:.3f}"
        for name, label in (
            ("cider_d", "CIDEr-D"),
            ("bleu_4", "BLEU-4"),
            ("token_accuracy", "token accuracy"),
        )
        if name in metrics
    )
    sheet = contact_sheet(
        cells,
        title=f"{record.recipe}, step {record.step}",
        subtitle=f"{metrics['images']:,.0f} {NAMED[seen]}: {scores}",
        columns=_COLUMNS,
        font=font,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ---- command line ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 1 after an error that was printed."""
    write_utf8()
    options = parse_in_any_order(_parser(), arguments)
    import torch

    from data_pipeline.loader.stream import DataError
    from data_pipeline.reading.reader import TransientReadError
    from data_pipeline.storage.errors import ShardError
    from pretrain.engine.checkpoint.files import CheckpointError
    from tools.convert.captioner import evaluate
    from tools.convert.record import RECORD, ExportRecord, way_to_export
    from tools.support.training_images import seen_in_training

    try:
        if options.metrics != ["captions"]:
            from tools.judge.command import judge

            return judge(options, console)
        if not (options.source / RECORD).is_file():
            raise ValueError(way_to_export(options.source))
        record = ExportRecord.read(options.source)
        found = evaluate(
            options.source,
            record.data(options.shards, options.caption_source, options.where),
            batch=options.batch,
            max_samples=options.max_samples,
            workers=options.workers,
            keep_images=options.sheet_rows * _COLUMNS if options.sheet else 0,
            device=device_of(options.device),
        )
        seen = seen_in_training(found.shards, options.where, record.training_shards)
        _print_results(record, found, seen, options.examples)
        if options.json:
            _write_json(options.json, record, options, found, seen)
            console.print(f"metrics and captions: {options.json}", highlight=False)
        if options.sheet:
            _write_sheet(options.sheet, record, options.font, found, seen)
            console.print(f"contact sheet: {options.sheet}", highlight=False)
        return 0
    except torch.OutOfMemoryError:
        _complain(f"the device's memory is too small for batches of {options.batch}: lower --batch")
    except (
        CheckpointError,
        DataError,
        ShardError,
        TransientReadError,
        OSError,
        ValueError,
    ) as error:
        _complain(str(error))
    return 1


def _complain(text: str) -> None:
    Console(stderr=True).print(
        f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True
    )


def _metric_names(text: str) -> list[str]:
    names = [one for one in text.split(",") if one]
    unknown = [one for one in names if one not in METRICS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown) or 'nothing'}: no such metric; there are {', '.join(METRICS)}"
        )
    if "captions" in names and len(names) > 1:
        raise argparse.ArgumentTypeError("captions is computed alone: ask for the others by itself")
    return names


def _add_judging(parser: argparse.ArgumentParser) -> None:
    """What metrics other than captions ask for."""
    group = parser.add_argument_group("metrics other than captions")
    group.add_argument("--train", nargs="+", metavar="SHARDS", help="knn, linear: to learn from")
    group.add_argument("--label-source", default="cls", help="of classes, as in recipes")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="zeroshot: class names and templates"
    )
    group.add_argument("--sizes", type=positive, nargs="+", metavar="N", help="resolutions: pixels")
    group.add_argument("--encoder", metavar="NAME", help="of a run that has several")
    group.add_argument("--task", metavar="NAME", help="whose head or texts, of a run with several")
    group.add_argument(
        "--pool",
        choices=("mean", "class_token", "head"),
        default="mean",
        help="knn, linear: what an image is (default %(default)s)",
    )
    add_weights(group)
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="curves and confusion matrix")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="run, export, or folder of transformers"
    )
    parser.add_argument(
        "--metrics",
        type=_metric_names,
        default=["captions"],
        metavar="NAMES",
        help=f"with commas between them, of {', '.join(METRICS)} (default: captions, alone)",
    )
    _add_judging(parser)
    parser.add_argument(
        "--shards",
        nargs="+",
        required=True,
        help="held-out shards: folders, tars, globs or {000..123} expressions",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help='only samples that meet it, as in recipes: "width >= 256"',
    )
    parser.add_argument(
        "--caption-source",
        nargs="+",
        metavar="SOURCE",
        help="txt or json:KEY; of several, the first that a sample has; default: "
        "as the exported task trained",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="N",
        help="images at a time (default %(default)s)",
    )
    parser.add_argument(
        "--max-samples",
        type=positive,
        metavar="N",
        help="at most so many, spread evenly over the shards",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that read images (default %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--examples",
        type=int,
        default=4,
        metavar="N",
        help="captions to print (default %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics and captions")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="draw the first images with predicted and reference captions",
    )
    parser.add_argument(
        "--sheet-rows",
        type=positive,
        default=4,
        metavar="N",
        help=f"rows of {_COLUMNS} images on the sheet (default %(default)s)",
    )
    parser.add_argument("--font", help="TrueType file for the sheet, for other than Latin scripts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
