"""`tools.evaluate SOURCE --metrics ...`: which metrics fit, their numbers, JSON and pictures."""

import argparse
import json
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from data_pipeline.order.sources import open_source
from tools.judge.metrics import Metrics
from tools.judge.models import open_judged
from tools.judge.moves import MOVES
from tools.support.arguments import device_of
from tools.support.line_chart import Line, Panel, line_chart
from tools.support.shard_facts import class_names
from tools.support.training_images import NAMED, seen_in_training


def judge(options: argparse.Namespace, console: Console) -> int:
    """Run the metrics that were asked for. Raises ValueError for one that does not fit."""
    device = device_of(options.device)
    judged = open_judged(options.source, options, device)
    wanted = ["top1" if name == "top5" else name for name in options.metrics]
    if wrong := [name for name in wanted if name not in judged.fits]:
        raise ValueError(
            f"{options.source}: {', '.join(wrong)} does not fit it; what does: "
            f"{', '.join(judged.fits)}" + _why(wrong)
        )
    metrics = Metrics(judged, options, device)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in dict.fromkeys(wanted):
            with console.status(name):
                found |= getattr(metrics, name)()
    seen = seen_in_training(
        open_source(options.shards, options.where).shards, options.where, judged.trained
    )
    table = Table(title=f"{judged.name}: {NAMED[seen]}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    console.print(table)
    for shards, counts in metrics.left_out.items():
        for why, count in counts.items():
            if count:
                console.print(f"[yellow]{count} images of {shards} are left out: {why}[/]")
    if options.json:
        content = {
            "source": str(options.source),
            "images_are": seen,
            "metrics": found,
            "left_out": metrics.left_out,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content | judged.facts, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
        console.print(f"metrics: {options.json}", highlight=False)
    if options.plot:
        picture = draw(found, class_names(options.shards), f"{judged.name}, {NAMED[seen]}")
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.plot)
        console.print(f"picture: {options.plot}", highlight=False)
    return 0


def _why(wrong: list[str]) -> str:
    says = {
        "captions": "captions are those of an export of a captioner: `python -m tools.convert "
        "export-git --run RUN --out EXPORT`",
        "zeroshot": "zeroshot and retrieval are for contrastive tasks, and CLIPModel folders",
        "top1": "top1, resolutions and invariance need a classification head: `python -m "
        "tools.finetune classify SOURCE --data PLACE --out FOLDER` gives it one",
    }
    alike = {"retrieval": "zeroshot", "resolutions": "top1", "invariance": "top1"}
    lines = {says[alike.get(name, name)] for name in wrong if alike.get(name, name) in says}
    return "".join(f"; {line}" for line in sorted(lines))


def draw(found: dict[str, Any], classes: list[str], title: str) -> Image.Image:
    """Curves side by side, and the confusion matrix. Raises ValueError: neither was computed."""
    panels = []
    if "resolutions" in found:
        curve = found["resolutions"]
        panels.append(Panel("pixels", [Line("top1", curve["size"], curve["top1"])]))
    units = {"translation": "pixels", "rotation": "degrees", "scale": "side seen"}
    for move in MOVES:
        if move in found:
            curve = found[move]
            lines = [Line(name, curve["amount"], curve[name]) for name in ("top1", "agreement")]
            panels.append(Panel(f"{move}, {units[move]}", lines))
    pictures = [line_chart(panels, title=title)] if panels else []
    tables = [found[key] for key in ("confusion", "zeroshot_confusion") if key in found]
    pictures += [_confusion(table, classes) for table in tables]
    if not pictures:
        raise ValueError("--plot: none of these metrics is a curve or a table; leave it out")
    size = max(one.width for one in pictures), sum(one.height for one in pictures)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height
    return sheet


def _confusion(table: list[list[int]], classes: list[str]) -> Image.Image:
    """Rows are what images are, columns what was said; the darker, the more of the row."""
    names = classes if len(classes) == len(table) else [str(n) for n in range(len(table))]
    side, left, top = (28 if len(table) <= 30 else 6), 110, 30
    image = Image.new("RGB", (left + side * len(table) + 10, top + side * len(table) + 10), "white")
    pen = ImageDraw.Draw(image)
    pen.text((8, 8), "is (rows) and said (columns)", fill="#16202c")
    for y, row in enumerate(table):
        total = max(1, sum(row))
        if side > 12:
            pen.text((8, top + y * side + 8), names[y][:16], fill="#16202c")
        for x, count in enumerate(row):
            part = count / total
            colour = tuple(round(255 - (255 - c) * part) for c in (11, 92, 173))
            place = (left + x * side, top + y * side)
            pen.rectangle((*place, place[0] + side - 1, place[1] + side - 1), fill=colour)
            if side > 12 and count:
                ink = "white" if part > 0.5 else "#16202c"
                pen.text((place[0] + 4, place[1] + 8), str(count)[:4], fill=ink)
    return image
