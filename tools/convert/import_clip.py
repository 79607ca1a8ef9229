"""`tools.convert import-clip`: CLIP of OpenAI, open_clip, transformers and timm, as weights that a
recipe of ours begins from."""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from pretrain.recipe.overlay import to_yaml
from tools.convert.formats.clip import (
    Names,
    names_of,
    plain,
    resize_positions,
    task_map,
    text_map,
    turned,
    vision_map,
)
from tools.support.weight_files import read_config, read_tensors, save_tensors, weight_file

_HEAD_WIDTH = 64  # of all of CLIP's models but a few; weights do not show the number of heads
_EPSILON = 1e-5
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Files of open_clip, in the order in which a folder is searched.
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass
class Imported:
    """CLIP under our names, and the part of a recipe that fits."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    objective: dict[str, Any] | None = None
    """Of the contrastive task, if both towers and what joins them are taken."""
    table: list[tuple[str, str]] = field(default_factory=list)
    """What became of what: (its name, "taken" or else with the reason)."""
    notes: list[str] = field(default_factory=list)


def command(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `tools.convert.arguments`."""
    file = clip_file(options.source)
    state = plain(read_tensors(file, ("state_dict", "model"), skip_objects=True))
    try:
        found = import_clip(state, Config.beside(file), options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    save_tensors(found.tensors, options.out, "clip")
    count = sum(tensor.numel() for tensor in found.tensors.values())
    _say(console, f"{options.out}: {len(found.tensors)} tensors, {count / 1e6:,.1f} M values")
    for name, fate in found.table:
        _say(console, f"  {name}: {fate}")
    for note in found.notes:
        _say(console, f"assumed: {note}")
    _say(console, "settings for a recipe:")
    print(_recipe(found, file, options), end="")
    return 0


def clip_file(source: Path) -> Path:
    """The weight file that is meant. Raises ValueError: there is none."""
    for name in _OPEN_CLIP:
        if (source / name).is_file():
            return source / name
    return weight_file(source)


class Config:
    """What the files beside the weights say of the towers; weights do not show everything."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        self.vision, self.text = vision, text

    @classmethod
    def beside(cls, file: Path) -> "Config":
        """Of transformers' config.json or open_clip's. Raises ValueError: damaged."""
        theirs = file.parent / "open_clip_config.json"
        if theirs.is_file():
            try:
                return cls.of_open_clip(json.loads(theirs.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{theirs} is damaged or no JSON: {error}") from None
        found = read_config(file) or {}
        if "architecture" in found:
            return cls.of_timm(found)
        if "vision_config" in found:
            return cls(found["vision_config"] or {}, found.get("text_config") or {})
        return cls(found if "hidden_act" in found else {}, {})

    @classmethod
    def of_timm(cls, content: Mapping[str, Any]) -> "Config":
        """Of a folder of timm's, whose names of models tell the activation."""
        args = content.get("model_args") or {}
        quick = "quickgelu" in content["architecture"] or args.get("act_layer") == "quick_gelu"
        heads = args.get("num_heads")
        return cls(
            {
                "hidden_act": "quick_gelu" if quick else "gelu",
                **({"num_attention_heads": heads} if heads else {}),
            },
            {},
        )

    @classmethod
    def of_open_clip(cls, content: Mapping[str, Any]) -> "Config":
        """Its `model_cfg`, in transformers' words."""
        model = content["model_cfg"]
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        vision, text = model["vision_cfg"], model.get("text_cfg") or {}
        if "timm_model_name" in vision or "hf_model_name" in text:
            raise ValueError("its towers are those of timm or transformers, not CLIP's")
        heads = vision["width"] // vision.get("head_width", _HEAD_WIDTH)
        return cls(
            {"hidden_act": act, "num_attention_heads": heads},
            {"hidden_act": act, "num_attention_heads": text.get("heads")},
        )


def import_clip(
    state: Mapping[str, Tensor], config: Config, options: argparse.Namespace
) -> Imported:
    """Rename the tensors and derive the settings.

    state: as `plain` returns it.
    options: encoder, text_encoder, task: names in the recipe; image_size: side of the images that
        the position table is made for, None: as it is; only: patterns of our names; heads,
        activation: where no configuration says it.

    Raises:
        ValueError: tensors are missing or unknown, or a model that ours cannot be.
    """
    names = names_of(state)
    if names is None:
        raise ValueError(
            "these are not weights of CLIP: there is no class embedding under its names, and no "
            f"norm_pre; the file has {', '.join(sorted(state)[:5]) or 'no tensors'}"
        )
    groups = _groups(state, names)
    found = Imported()
    found.table += [(name, "left out: no part of our model") for name in sorted(groups["other"])]
    vision = {name: turned(name, tensor) for name, tensor in groups["vision"].items()}
    ours = vision_map(names, options.encoder, _prefix(vision, names)).to_ours(vision)
    found.encoders[options.encoder] = _vit(ours, config.vision, options, found)
    if groups["text"]:
        start = "text_model." if names == "transformers" else ""
        text = text_map(names, options.text_encoder, start).to_ours(groups["text"])
        found.encoders[options.text_encoder] = _text(text, config.text, options, found)
        ours |= text
    if len(groups["task"]) == 3:
        turn = {name: turned(name, tensor) for name, tensor in groups["task"].items()}
        ours |= task_map(names, options.task).to_ours(turn)
        found.objective = {
            "type": "contrastive",
            "encoder": options.encoder,
            "text_encoder": options.text_encoder,
            "pool": "class_token",
            "width": len(ours[f"objectives.{options.task}.image_projection.weight"]),
        }
    else:
        found.table += [
            (name, "left out: of no use without the text tower") for name in sorted(groups["task"])
        ]
    _choose(ours, options, found)
    return found


def _groups(state: Mapping[str, Tensor], names: Names) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part: vision, text, task, other."""
    task = {
        "visual.proj",
        "text_projection",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    }
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "task": {}, "other": {}}
    whole = any(name.startswith(("visual.", "vision_model.")) for name in state)
    for name, tensor in state.items():
        if name in task or name == "proj":
            part = "task"
        elif names == "timm" and name.startswith(("head.", "fc_norm.")):
            part = "other"
        elif not whole or name.startswith(("visual.", "vision_model.")):
            part = "vision"
        else:
            part = "text"
        parts[part][name] = tensor
    return parts


def _prefix(vision: Mapping[str, Tensor], names: Names) -> str:
    first = next(iter(vision))
    return next((p for p in ("visual.", "vision_model.") if first.startswith(p)), "")


def _vit(
    ours: dict[str, Tensor], config: Mapping[str, Any], options: argparse.Namespace, found: Imported
) -> dict[str, Any]:
    """Settings of the vision tower; the position table is resized where that is asked for."""
    start = f"encoders.{options.encoder}."
    patches = ours[f"{start}embedding.patches.weight"]
    width, channels, patch, other = patches.shape
    if channels != 3 or patch != other:
        raise ValueError(f"its patches are {channels} x {patch} x {other}; ours are 3 x P x P")
    positions = f"{start}embedding.positions"
    grid = round((len(ours[positions]) - 1) ** 0.5)
    if grid * grid + 1 != len(ours[positions]):
        raise ValueError(f"its {len(ours[positions])} positions are no square and a class token")
    size = options.image_size or grid * patch
    if size % patch:
        raise ValueError(f"--image-size {size} is no multiple of the patches of {patch} pixels")
    if size != grid * patch:
        ours[positions] = resize_positions(ours[positions], size // patch)
        found.table.append((positions, f"resized from {grid * patch} to {size} pixels (bicubic)"))
    return {
        "type": "vit",
        "image_size": size,
        "patch_size": patch,
        "width": width,
        **_tower(ours, start, width, config, options, found),
    }


def _text(
    ours: Mapping[str, Tensor],
    config: Mapping[str, Any],
    options: argparse.Namespace,
    found: Imported,
) -> dict[str, Any]:
    start = f"encoders.{options.text_encoder}."
    words = ours[f"{start}embedding.words.weight"]
    found.notes.append(f"the tokenizer must have {len(words):,} entries (largest id + 1)")
    return {
        "type": "text",
        "width": words.shape[1],
        "max_positions": len(ours[f"{start}embedding.positions"]),
        "causal": True,
        "pool": "end",
        **_tower(ours, start, words.shape[1], config, options, found),
    }


def _tower(
    ours: Mapping[str, Tensor],
    start: str,
    width: int,
    config: Mapping[str, Any],
    options: argparse.Namespace,
    found: Imported,
) -> dict[str, Any]:
    """What both towers have: depth, heads, MLP, activation."""
    of_encoder = start.removesuffix(".")
    epsilon = config.get("layer_norm_eps", _EPSILON)
    if epsilon != _EPSILON:
        raise ValueError(f"{of_encoder}: its layer_norm_eps is {epsilon}, ours {_EPSILON}")
    heads = options.heads or config.get("num_attention_heads")
    if not heads:
        heads = max(1, width // _HEAD_WIDTH)
        found.notes.append(
            f"{of_encoder}: {heads} heads of {width // heads} channels, which "
            "weights do not show (--heads)"
        )
    activation = options.activation or config.get("hidden_act")
    if not activation:
        activation = "quick_gelu"
        found.notes.append(
            f"{of_encoder}: quick_gelu as in OpenAI's models, which weights do not "
            "show; many models of open_clip have gelu (--activation)"
        )
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{of_encoder}: its hidden_act is {activation}, ours quick_gelu or gelu")
    hidden = len(ours[f"{start}blocks.0.mlp.expand.weight"])
    pattern = re.compile(re.escape(start) + r"blocks\.(\d+)\.")
    layers = 1 + max(int(match[1]) for name in ours if (match := pattern.match(name)))
    return {"layers": layers, "heads": heads, "mlp_ratio": hidden / width, "activation": activation}


def _choose(ours: dict[str, Tensor], options: argparse.Namespace, found: Imported) -> None:
    """Keep what --only names, and say what became of each part. Raises ValueError: it names
    nothing."""
    for pattern in options.only:
        if not any(fnmatchcase(name, pattern) for name in ours):
            parts = sorted({".".join(name.split(".")[:2]) for name in ours})
            raise ValueError(
                f"--only {pattern!r} names no tensor; there are those of {', '.join(parts)}"
            )
    kept = {name for name in ours if any(fnmatchcase(name, p) for p in options.only)}
    found.tensors = {name: tensor for name, tensor in ours.items() if name in kept}
    for part in dict.fromkeys(".".join(name.split(".")[:2]) for name in ours):
        own = [name for name in ours if name.startswith(f"{part}.")]
        taken = sum(name in kept for name in own)
        fate = f"taken, {taken} tensors" if taken else "left out: --only does not name it"
        found.table.append((part, fate))
        if not taken:
            found.encoders.pop(part.removeprefix("encoders."), None)
            if part == f"objectives.{options.task}":
                found.objective = None


def _recipe(found: Imported, file: Path, options: argparse.Namespace) -> str:
    """The part of a recipe that describes what was taken."""
    recipe: dict[str, Any] = {"initial_weights": str(options.out)}
    if found.encoders:
        recipe["model"] = {"encoders": found.encoders}
    if found.objective:
        mean, std = _statistics(file)
        recipe["tasks"] = {
            options.task: {
                "objective": found.objective,
                "data": {"image": {"mean": mean, "std": std}},
            }
        }
    if options.text_encoder in found.encoders and (file.parent / "tokenizer.json").is_file():
        recipe["tokenizer"] = {"path": str(file.parent)}
    return to_yaml(recipe)


def _statistics(file: Path) -> tuple[list[float], list[float]]:
    """What images were normalised by."""
    beside = file.parent / "preprocessor_config.json"
    found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return list(found.get("image_mean", CLIP_MEAN)), list(found.get("image_std", CLIP_STD))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
