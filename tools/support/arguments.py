"""Command-line arguments that several tools share, and their types."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def add_run(parser: Any, required: bool = True) -> None:
    """Add --run, whose value is `run_dir`, to a parser or a group of one."""
    options = {"required": True} if required else {}
    parser.add_argument(
        "--run",
        dest="run_dir",
        type=Path,
        metavar="RUN",
        **options,
        help="run directory (its newest checkpoint) or a checkpoint folder",
    )


def add_weights(parser: Any, targets: bool = True) -> None:
    """Add --weights, which `tools.support.trained.open_run` takes; targets: also momentum
    targets."""
    text = {"master": "trained weights", "ema": "their moving average (`ema` in the recipe)"}
    if targets:
        text["target"] = "momentum targets in the place of what these follow"
    parser.add_argument(
        "--weights",
        choices=text,
        default="master",
        help=", or ".join(text.values()) + " (default %(default)s)",
    )


def add_device(parser: Any) -> None:
    """Add --device, where a model runs; `device_of` says which torch.device that is."""
    parser.add_argument(
        "--device",
        type=_device,
        metavar="DEVICE",
        help="where the model runs (default: a GPU if there is one, else cpu)",
    )


def device_of(name: str | None) -> "torch.device":
    """The device of --device; None: the default."""
    import torch  # not before the arguments are known to be right: it takes seconds

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def positive(text: str) -> int:
    """Parse a count."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a number that may be 0."""
    return _whole(text, 0)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device such as cpu or cuda:0")
    if text != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text}: this machine shows no GPU to torch; use cpu")
    return text


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
    return int(text)
