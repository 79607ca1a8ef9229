"""Commands of `tools.convert` that lie in modules of their own: their arguments, without torch."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.recipe.exported import EXPORTS
from tools.support.arguments import add_run, add_weights, positive

Command = Callable[[argparse.Namespace, Console], int]


def add_internimage(commands: Any) -> None:
    """Add import-internimage and export-internimage to the parsers of `tools.convert`."""
    text = "InternImage weights of others under our names"
    take = commands.add_parser("import-internimage", help=text, description=text)
    take.set_defaults(run=_later("tools.convert.internimage", "import_command"))
    take.add_argument(
        "source",
        type=Path,
        help="official .pth (foreign objects in it are passed over, never made), "
        "transformers folder, or .safetensors file",
    )
    take.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    take.add_argument(
        "--encoder",
        default="image",
        metavar="NAME",
        help="its name in model.encoders (default %(default)s)",
    )
    take.add_argument(
        "--task",
        default="classify",
        metavar="NAME",
        help="name in tasks of the classification that has the linear layer (default %(default)s)",
    )
    take.add_argument(
        "--weights",
        choices=("master", "ema"),
        default="master",
        help="ema: the moving average that the file has too (default %(default)s)",
    )
    take.add_argument(
        "--settings",
        type=Path,
        metavar="FILE.yaml",
        help="settings of the encoder as in a recipe, for a model that is not "
        "published, without a config.json or NAME.settings.yaml beside it",
    )
    take.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="official names of tensors that are not taken and may be missing, such "
        "as 'head.*' for other classes; may be given again",
    )
    take.add_argument(
        "--head-rows",
        type=Path,
        metavar="FILE",
        help="rows of the linear layer to take, one number a line (as in the "
        "official map from ImageNet-22K to 1K)",
    )
    _add_export_internimage(commands)


def _add_export_internimage(commands: Any) -> None:
    text = "a run's InternImage for the official code, its detectors, or transformers"
    give = commands.add_parser("export-internimage", help=text, description=text)
    give.set_defaults(run=_later("tools.convert.internimage", "export_command"))
    add_run(give)
    give.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file that ends in .pth; for transformers a folder that is not there",
    )
    layouts = ("official", "detection", "bevformer", "transformers", "m3i")
    give.add_argument(
        "--format",
        choices=layouts,
        default="official",
        help="m3i: raw M3I checkpoint, both branches (default %(default)s)",
    )
    give.add_argument(
        "--encoder",
        default="image",
        metavar="NAME",
        help="its name in model.encoders (default %(default)s)",
    )
    give.add_argument(
        "--task",
        metavar="NAME",
        help="classification or m3i task whose linear layer goes along (default: none)",
    )
    give.add_argument(
        "--classes",
        type=positive,
        metavar="N",
        help="with --format m3i, of a task that learns no classes: write a linear "
        "layer of zeros for so many, since the loader of that layout wants one",
    )
    add_weights(give)


def add_clip(commands: Any) -> None:
    """Add import-clip to the parsers of `tools.convert`."""
    text = "CLIP of OpenAI, open_clip, transformers or timm under our names"
    take = commands.add_parser("import-clip", help=text, description=text)
    take.set_defaults(run=_later("tools.convert.import_clip", "command"))
    take.add_argument(
        "source",
        type=Path,
        help="folder of transformers, open_clip or timm, or a .safetensors or .pt "
        "file (foreign objects in it are passed over, never made)",
    )
    take.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    for option, what, name in (
        ("--encoder", "model.encoders of the image encoder", "image"),
        ("--text-encoder", "model.encoders of the text encoder", "text"),
        ("--task", "tasks of the contrastive task", "contrast"),
    ):
        take.add_argument(
            option, default=name, metavar="NAME", help=f"name in {what} (default %(default)s)"
        )
    take.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="our names to take, for example 'encoders.image.*' for a recipe that "
        "has the image encoder alone (default: all)",
    )
    take.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="make the position table for images of this size (default: as it is)",
    )
    take.add_argument(
        "--heads",
        type=positive,
        metavar="N",
        help="attention heads of both towers, if no configuration lies beside the "
        "weights, which do not show it",
    )
    take.add_argument(
        "--activation", choices=("quick_gelu", "gelu"), help="of both towers, likewise"
    )


def add_import(commands: Any) -> None:
    """Add import, which finds out what it is given, to the parsers of `tools.convert`."""
    text = "weights of others under our names, whatever they are"
    more = (
        "Further options are those of the command for what it is: import-clip, import-git or "
        "import-internimage."
    )
    take = commands.add_parser("import", help=text, description=f"{text}. {more}")
    take.add_argument("source", type=Path, help="folder or file")
    take.add_argument(
        "--from",
        dest="origin",
        choices=("clip", "git", "internimage", "encoder"),
        help="what it is (default: seen from its names)",
    )


def add_export(commands: Any) -> None:
    """Add export, which knows every format, to the parsers of `tools.convert`."""
    text = "what a run has learned, in any format that others load"
    give = commands.add_parser("export", help=text, description=text)
    give.set_defaults(run=_later("tools.convert.export", "command"))
    add_run(give)
    which = give.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--to", metavar="FORMAT", choices=EXPORTS, help=f"one of {', '.join(EXPORTS)}"
    )
    which.add_argument(
        "--list",
        action="store_true",
        help="say of every format whether this run can be it, or why not",
    )
    give.add_argument("--out", type=Path, help="file or folder to write")
    give.add_argument("--task", metavar="NAME", help="whose head or other tower goes along")
    give.add_argument("--encoder", metavar="NAME", help="its name in model.encoders")
    give.add_argument("--no-head", action="store_true", help="without the head of a task")
    give.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="side of the images (default: as the recipe evaluates)",
    )
    add_weights(give)


def add_encoder(commands: Any) -> None:
    """Add import-encoder to the parsers of `tools.convert`."""
    text = "a BERT, RoBERTa, Swin or ResNet of transformers under our names"
    take = commands.add_parser("import-encoder", help=text, description=text)
    take.set_defaults(run=_later("tools.convert.formats.encoders", "import_command"))
    take.add_argument(
        "source", type=Path, help="local folder with config.json and model.safetensors"
    )
    take.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    take.add_argument(
        "--encoder",
        default="image",
        metavar="NAME",
        help="its name in model.encoders (default %(default)s)",
    )


def add_graph(commands: Any) -> None:
    """Add export-graph to the parsers of `tools.convert`."""
    text = "a classifier, or the maps of an InternImage, as ONNX or torch.export graph"
    give = commands.add_parser("export-graph", help=text, description=text)
    give.set_defaults(run=_later("tools.convert.graph", "export"))
    source = give.add_mutually_exclusive_group(required=True)
    add_run(source, required=False)  # the group requires one of them
    source.add_argument(
        "--source",
        type=Path,
        help="InternImage weights that import-internimage reads, such as an official .pth",
    )
    give.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.onnx (ONNX; weights above 2 GB beside it, in FILE.onnx.data) or "
        "FILE.pt2 (for torch.export.load)",
    )
    give.add_argument(
        "--outputs",
        choices=("logits", "maps"),
        default="logits",
        help="logits (B, classes), or the maps (B, C, H, W) of the four stages of an "
        "InternImage (default %(default)s)",
    )
    give.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="height and width, or one number for both; default for the logits of a "
        "run: as its recipe evaluates",
    )
    add_weights(give)
    give.add_argument(
        "--task",
        metavar="NAME",
        help="with --run and logits: classification task, if there are several",
    )
    give.add_argument(
        "--encoder",
        metavar="NAME",
        help="with --run and maps: its name in model.encoders (default image)",
    )
    give.add_argument(
        "--settings", type=Path, metavar="FILE.yaml", help="with --source: as in import-internimage"
    )


def add_weight_files(commands: Any) -> None:
    """Add export-weights to the parsers of `tools.convert`."""
    text = "a run's weights under our names, for initial_weights of another recipe"
    give = commands.add_parser("export-weights", help=text, description=text)
    give.set_defaults(run=_later("tools.convert.weights", "export"))
    add_run(give)
    give.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    give.add_argument(
        "--format",
        choices=("safetensors", "dcp"),
        default="safetensors",
        help="dcp: a folder for torch.distributed.checkpoint, names under `model` "
        "(default %(default)s)",
    )
    give.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names to take, for example 'encoders.image.*' for a recipe with other "
        "tasks (default: all)",
    )
    add_weights(give)


def _later(module: str, function: str) -> Command:
    """A function that is imported when it is called: torch takes seconds, and --help needs none."""

    def run(options: argparse.Namespace, console: Console) -> int:
        return getattr(importlib.import_module(module), function)(options, console)

    return run
