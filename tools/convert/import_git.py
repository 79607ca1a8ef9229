"""Read GIT weights of others: which file, which format, and the recipe settings that fit them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.git.weights import detect_format, import_git
from pretrain.models.vit import VitSettings
from tools.support.weight_files import read_config, read_tensors, weight_file

# CLIP and BERT give every head this many channels, and GIT's released models follow them. Weights
# do not show the number of heads.
_HEAD_WIDTH = 64
# What our model has built in, and a configuration may say otherwise.
_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vision_config.layer_norm_eps": 1e-5,
    "vision_config.num_channels": 3,
}


@dataclass(frozen=True)
class Source:
    """Foreign weights, and transformers' configuration where one lies beside them."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Imported:
    """Weights under our names, and the settings of the model that they belong to."""

    format: str
    tensors: dict[str, Tensor]
    vit: VitSettings
    decoder: GitDecoderSettings
    vocab_size: int
    notes: list[str]
    """What the weights do not say and was assumed."""


def read_source(path: Path) -> Source:
    """Read a transformers folder, a .safetensors file, or a .pt / .bin file of tensors.

    Raises:
        ValueError: nothing usable is there, or a file is damaged or holds more than tensors.
    """
    file = weight_file(path)
    return Source(file, read_tensors(file), read_config(file))


def import_weights(
    source: Source,
    expected: str,
    encoder: str,
    task: str,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Imported:
    """Rename the tensors and derive the settings.

    expected: "original", "transformers" or "auto".
    encoder, task: names of the encoder and the task in the recipe.
    encoder_heads, decoder_heads: attention heads; none: from the configuration, or by convention.

    Raises:
        ValueError: another format, missing or unknown tensors, or a model that ours cannot be.
    """
    found = detect_format(source.tensors)
    if expected not in ("auto", found):
        raise ValueError(
            f"{source.path}: --format {expected}, but the names are those of the {found} format; "
            "leave --format out"
        )
    config = (source.config or {}) if found == "transformers" else {}
    _check_fixed(source.path, config)
    try:
        ours = import_git(source.tensors, encoder, task)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    notes: list[str] = []
    vision = config.get("vision_config") or {}
    vit = _vit(
        ours,
        f"encoders.{encoder}",
        vision,
        encoder_heads or vision.get("num_attention_heads"),
        notes,
    )
    decoder = _decoder(
        ours,
        f"objectives.{task}.decoder",
        config,
        found,
        decoder_heads or config.get("num_attention_heads"),
        notes,
    )
    named = config.get("num_image_with_embedding") or 0
    if config and named != decoder.frames:
        raise ValueError(
            f"{source.path.parent / 'config.json'}: num_image_with_embedding is {named}, but the "
            f"weights have temporal embeddings of {decoder.frames} frames"
        )
    words = ours[f"objectives.{task}.decoder.embedding.words.weight"]
    return Imported(found, ours, vit, decoder, len(words), notes)


def _check_fixed(path: Path, config: Mapping[str, Any]) -> None:
    for key, expected in _FIXED.items():
        *parents, leaf = key.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) or {}
        if leaf in node and node[leaf] != expected:
            raise ValueError(
                f"{path.parent / 'config.json'}: {key} is {node[leaf]!r}; our GIT has {expected!r} "
                "there and cannot be this model"
            )


def _vit(
    tensors: Mapping[str, Tensor],
    prefix: str,
    config: Mapping[str, Any],
    heads: int | None,
    notes: list[str],
) -> VitSettings:
    patches = tensors[f"{prefix}.embedding.patches.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    places = len(tensors[f"{prefix}.embedding.positions"]) - 1
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"the position table has {places} places, which form no square of patches")
    activation = config.get("hidden_act")
    if activation is None:
        activation = "quick_gelu"
        notes.append("activation quick_gelu, as in CLIP and all released GIT models")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"the encoder's hidden_act is {activation!r}; ours has quick_gelu or gelu")
    return VitSettings(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=_count(tensors, f"{prefix}.blocks."),
        heads=heads or _heads(width, "encoder", notes),
        mlp_ratio=len(tensors[f"{prefix}.blocks.0.mlp.expand.weight"]) / width,
        activation=activation,
    )


def _decoder(
    tensors: Mapping[str, Tensor],
    prefix: str,
    config: Mapping[str, Any],
    source: str,
    heads: int | None,
    notes: list[str],
) -> GitDecoderSettings:
    positions = tensors[f"{prefix}.embedding.positions.weight"]
    width = positions.shape[1]
    return GitDecoderSettings(
        width=width,
        layers=_count(tensors, f"{prefix}.layers."),
        heads=heads or _heads(width, "decoder", notes),
        mlp_width=len(tensors[f"{prefix}.layers.0.expand.weight"]),
        max_positions=len(positions),
        frames=len(tensors.get(f"{prefix}.temporal.vectors", ())),
        dropout=config.get("hidden_dropout_prob", 0.1),
        tied_output=f"{prefix}.output.weight" not in tensors,
        # transformers uses one epsilon everywhere, the original another one for the embedding.
        embedding_norm_eps=1e-8 if source == "original" else 1e-12,
    )


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)})


def _heads(width: int, tower: str, notes: list[str]) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"the weights do not show how many attention heads the {tower} has, and its width "
            f"{width} is no multiple of the usual {_HEAD_WIDTH}; say it with --{tower}-heads"
        )
    notes.append(f"{width // _HEAD_WIDTH} heads in the {tower}: {_HEAD_WIDTH} channels each")
    return width // _HEAD_WIDTH
