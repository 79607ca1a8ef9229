"""CLIP's names, and those of its vision tower in timm, to ours and back.

One table a tower says which tensor is which; `names_of` says which column a file is written in.
Our layers compute what CLIP's do, so that a rename is all; what cannot be said by names is a
projection that lies on its side, and axes of length 1.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.key_map import KeyMap

Names = Literal["openai", "transformers", "timm"]
"""openai: of OpenAI's release and of open_clip."""

_COLUMN = {"openai": 1, "transformers": 2, "timm": 3}
_Q_K_V = ("q", "k", "v")

# Ours, openai, transformers, timm. <E> is our encoder; <V> is what stands before the names of a
# vision tower, <X> before those of a text tower, either perhaps nothing.
_VISION: tuple[tuple[str, str, str | tuple[str, ...], str], ...] = (
    (
        "<E>.embedding.class_token",
        "<V>class_embedding",
        "<V>embeddings.class_embedding",
        "cls_token",
    ),
    (
        "<E>.embedding.positions",
        "<V>positional_embedding",
        "<V>embeddings.position_embedding.weight",
        "pos_embed",
    ),
    (
        "<E>.embedding.patches.weight",
        "<V>conv1.weight",
        "<V>embeddings.patch_embedding.weight",
        "patch_embed.proj.weight",
    ),
    ("<E>.norm_before.{p}", "<V>ln_pre.{p}", "<V>pre_layrnorm.{p}", "norm_pre.{p}"),
    ("<E>.norm_after.{p}", "<V>ln_post.{p}", "<V>post_layernorm.{p}", "norm.{p}"),
)
_TEXT: tuple[tuple[str, str, str], ...] = (
    (
        "<T>.embedding.words.weight",
        "token_embedding.weight",
        "<X>embeddings.token_embedding.weight",
    ),
    ("<T>.embedding.positions", "positional_embedding", "<X>embeddings.position_embedding.weight"),
    ("<T>.norm.{p}", "ln_final.{p}", "<X>final_layer_norm.{p}"),
)
# One row a part of a block: ours, openai, transformers, timm.
_BLOCK: tuple[tuple[str, str, str | tuple[str, ...], str], ...] = (
    (
        "attention.qkv.{p}",
        "attn.in_proj_{p}",
        tuple(f"self_attn.{x}_proj.{{p}}" for x in _Q_K_V),
        "attn.qkv.{p}",
    ),
    ("attention.output.{p}", "attn.out_proj.{p}", "self_attn.out_proj.{p}", "attn.proj.{p}"),
    ("norm_attention.{p}", "ln_1.{p}", "layer_norm1.{p}", "norm1.{p}"),
    ("norm_mlp.{p}", "ln_2.{p}", "layer_norm2.{p}", "norm2.{p}"),
    ("mlp.expand.{p}", "mlp.c_fc.{p}", "mlp.fc1.{p}", "mlp.fc1.{p}"),
    ("mlp.reduce.{p}", "mlp.c_proj.{p}", "mlp.fc2.{p}", "mlp.fc2.{p}"),
)
_LAYERS = {
    "openai": "transformer.resblocks.{n}.",
    "transformers": "encoder.layers.{n}.",
    "timm": "blocks.{n}.",
}
# The head of a contrastive task: ours, openai, transformers.
_TASK = (
    ("<C>.image_projection.weight", "visual.proj", "visual_projection.weight"),
    ("<C>.text_projection.weight", "text_projection", "text_projection.weight"),
    ("<C>.temperature.log_scale", "logit_scale", "logit_scale"),
)

# Held by some files, but no part of what the model computes.
IGNORED = (
    "embeddings.position_ids",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)


def vision_map(names: Names, encoder: str, before: str = "") -> KeyMap:
    """The table of a vision tower; before: what stands before its names."""
    rules = [(row[0], row[_COLUMN[names]]) for row in _VISION]
    words = {"E": f"encoders.{encoder}", "V": before}
    return KeyMap(rules + _blocks(names, "<E>", "<V>", "b"), words, "CLIP vision tower", names)


def text_map(names: Names, encoder: str, before: str = "") -> KeyMap:
    """The table of a text tower."""
    rules = [(row[0], row[_COLUMN[names]]) for row in _TEXT]
    words = {"T": f"encoders.{encoder}", "X": before}
    return KeyMap(rules + _blocks(names, "<T>", "<X>", "l"), words, "CLIP text tower", names)


def task_map(names: Names, task: str) -> KeyMap:
    """The table of projections and temperature."""
    rules = [(row[0], row[_COLUMN[names]]) for row in _TASK]
    return KeyMap(rules, {"C": f"objectives.{task}"}, "CLIP's projections", names)


def _blocks(names: Names, ours: str, before: str, mark: str) -> list:
    """Rules of the blocks; their number is called `mark`, which must differ between towers."""
    start = before + _LAYERS[names].replace("{n}", f"{{{mark}}}")
    rules = []
    for row in _BLOCK:
        theirs = row[_COLUMN[names]]
        parts = (theirs,) if isinstance(theirs, str) else theirs
        spelled = tuple(start + part for part in parts)
        rules.append(
            (f"{ours}.blocks.{{{mark}}}.{row[0]}", spelled if len(spelled) > 1 else spelled[0])
        )
    return rules


def names_of(state: Iterable[str]) -> Names | None:
    """Which of the three ways of naming a file follows; None: none of them."""
    names = set(state)
    for known, marks in (
        ("openai", ("class_embedding", "visual.class_embedding")),
        ("transformers", ("embeddings.class_embedding", "vision_model.embeddings.class_embedding")),
        ("timm", ("norm_pre.weight",)),
    ):
        if names.intersection(marks):
            return known
    return None


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without `module.` of data parallelism, `text.` of open_clip's newer models, and buffers."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name.startswith(
            (
                "text.transformer.",
                "text.token_",
                "text.positional_",
                "text.ln_",
                "text.text_projection",
            )
        ):
            name = name.removeprefix("text.")
        if not name.endswith(IGNORED):
            found[name] = tensor
    return found


def turned(name: str, tensor: Tensor) -> Tensor:
    """A tensor under its name in a file, in the shape that our model has it in, or back again."""
    if name in ("visual.proj", "text_projection"):
        return tensor.T
    if name == "logit_scale":
        return tensor.reshape(() if tensor.dim() else (1,))
    if name == "cls_token":
        return tensor.reshape((1, 1, -1) if tensor.dim() == 1 else -1)
    if name == "pos_embed":
        return tensor[None] if tensor.dim() == 2 else tensor[0]
    return tensor


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A position table for another grid, bicubic as our encoder does for images of other sizes.

    table: (1 + n * n, width). Returns (1 + grid * grid, width) of its type.
    """
    old = round((len(table) - 1) ** 0.5)
    if old == grid:
        return table
    cells = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], cells.flatten(2)[0].T.to(table.dtype)])
