"""`tools.convert import SOURCE`: see what the weights are, and give them to the command of their
format."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pretrain.models.git.weights import detect_format
from tools.convert.formats.clip import names_of, plain
from tools.convert.import_clip import clip_file
from tools.support.weight_files import read_config, read_tensors

FORMATS = {
    "clip": "import-clip",
    "git": "import-git",
    "internimage": "import-internimage",
    "encoder": "import-encoder",
}
"""--from -> the command that is meant."""
_MODEL_TYPES = {
    "git": "git",
    "internimage": "internimage",
    "clip": "clip",
    "clip_vision_model": "clip",
    "bert": "encoder",
    "roberta": "encoder",
    "swin": "encoder",
    "resnet": "encoder",
}
_WRAPPINGS = ("state_dict", "model", "module", "model_ema")


def command_for(options: argparse.Namespace) -> str:
    """The command that imports `options.source`.

    Raises ValueError: nothing is there, or nothing that can be imported; the text says what it is.
    """
    if options.origin:
        return FORMATS[options.origin]
    source: Path = options.source
    if source.is_dir() and (source / "checkpoints").is_dir():
        raise ValueError(
            f"{source} is a run of this project: `python -m tools.convert "
            f"export-weights --run {source} --out FILE.safetensors` writes its "
            "weights for initial_weights"
        )
    file = clip_file(source)
    model_type = (read_config(file) or {}).get("model_type")
    if model_type in _MODEL_TYPES:
        return FORMATS[_MODEL_TYPES[model_type]]
    if model_type:
        raise ValueError(
            f"{source}: a model of type {model_type}, which none of our encoders is; "
            f"what can be taken: {', '.join(FORMATS)}"
        )
    return FORMATS[_by_names(source, plain(dict.fromkeys(_names(file))))]


def _names(file: Path) -> Iterable[str]:
    """Names of the tensors."""
    if file.suffix != ".safetensors":
        return read_tensors(file, _WRAPPINGS, skip_objects=True)
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None


def _by_names(source: Path, names: Iterable[str]) -> str:
    names = set(names)
    try:
        detect_format(names)
        return "git"
    except ValueError:
        pass
    if names_of(names):
        return "clip"
    marks = ("levels.0.", "levels0", "patch_embed.conv1")
    if any(mark in name for name in names for mark in marks):
        return "internimage"
    if any(name.startswith(("encoders.", "objectives.")) for name in names):
        raise ValueError(f"{source} has our own names already: give it to initial_weights as it is")
    if {"cls_token", "pos_embed"} <= names:
        raise ValueError(
            f"{source}: a vision transformer without norm_pre (MAE, DeiT, most of timm), while "
            "ours normalises its tokens before the first block: it would compute something else. "
            "timm's vit_*_clip_* have it and can be taken"
        )
    raise ValueError(
        f"{source}: none of the formats that can be taken ({', '.join(FORMATS)}); it "
        f"has {', '.join(sorted(names)[:5]) or 'no tensors'}"
    )
