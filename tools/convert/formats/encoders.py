"""Encoders of transformers under our names: BERT, RoBERTa, Swin and ResNet from local folders."""

import argparse
import importlib
import json
from pathlib import Path

from rich.console import Console

from pretrain.recipe.overlay import to_yaml
from tools.support.weight_files import save_tensors

_READERS = {
    "bert": "pretrain.models.bert.weights",
    "roberta": "pretrain.models.bert.weights",
    "swin": "pretrain.models.backbones.swin",
    "resnet": "pretrain.models.backbones.resnet",
}
"""Their model_type -> the module whose `load_folder` reads it."""


def import_command(options: argparse.Namespace, console: Console) -> int:
    """`import-encoder`: write the tensors, and print the settings that a recipe needs for them.

    Raises ValueError: no folder of such a model.
    """
    kind = _model_type(options.source)
    if kind not in _READERS:
        raise ValueError(
            f"{options.source}: model_type is {kind!r}, and not one of {', '.join(_READERS)}"
        )
    settings, weights = importlib.import_module(_READERS[kind]).load_folder(options.source)
    save_tensors(
        {f"encoders.{options.encoder}.{name}": t.contiguous() for name, t in weights.items()},
        options.out,
        kind,
    )
    count = sum(tensor.numel() for tensor in weights.values())
    console.print(
        f"{options.out}: {len(weights)} tensors, {count / 1e6:,.1f} M values, of a {kind}; "
        "settings for a recipe:",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    shape = settings.model_dump(mode="json", exclude={"gradient_checkpointing"})
    recipe = {
        "initial_weights": str(options.out),
        "model": {"encoders": {options.encoder: {"type": settings.type} | shape}},
    }
    print(to_yaml(recipe), end="")
    return 0


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: {error}; give the folder that `save_pretrained` of transformers wrote"
        ) from None
    return config.get("model_type") if isinstance(config, dict) else None
