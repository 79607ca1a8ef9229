"""GIT weights of the original repository and of transformers, to our names and back.

One table says which tensor is which (`key_map`). A conversion is strict: every tensor has its
counterpart, or the error names those that have none. Tensors only: reading and writing files is the
caller's work.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from pretrain.models.key_map import KeyMap

Format = Literal["original", "transformers"]

# Ours, original, transformers. <E> and <D> are the prefixes of our encoder and decoder, <I> and <V>
# those of the image encoders there; {b} counts encoder blocks, {l} decoder layers, {p} is weight or
# bias. Where transformers keeps three tensors we and the original keep one: rows q, k, v.
_Q_K_V = tuple(f"<V>.encoder.layers.{{b}}.self_attn.{part}_proj.{{p}}" for part in "qkv")
_TABLE: tuple[tuple[str, str, str | tuple[str, ...]], ...] = (
    ("<E>.embedding.class_token", "<I>.class_embedding", "<V>.embeddings.class_embedding"),
    (
        "<E>.embedding.positions",
        "<I>.positional_embedding",
        "<V>.embeddings.position_embedding.weight",
    ),
    ("<E>.embedding.patches.weight", "<I>.conv1.weight", "<V>.embeddings.patch_embedding.weight"),
    ("<E>.norm_before.{p}", "<I>.ln_pre.{p}", "<V>.pre_layrnorm.{p}"),
    ("<E>.norm_after.{p}", "<I>.ln_post.{p}", "<V>.post_layernorm.{p}"),
    ("<E>.blocks.{b}.attention.qkv.{p}", "<B>.attn.in_proj_{p}", _Q_K_V),
    (
        "<E>.blocks.{b}.attention.output.{p}",
        "<B>.attn.out_proj.{p}",
        "<V>.encoder.layers.{b}.self_attn.out_proj.{p}",
    ),
    (
        "<E>.blocks.{b}.norm_attention.{p}",
        "<B>.ln_1.{p}",
        "<V>.encoder.layers.{b}.layer_norm1.{p}",
    ),
    ("<E>.blocks.{b}.norm_mlp.{p}", "<B>.ln_2.{p}", "<V>.encoder.layers.{b}.layer_norm2.{p}"),
    ("<E>.blocks.{b}.mlp.expand.{p}", "<B>.mlp.c_fc.{p}", "<V>.encoder.layers.{b}.mlp.fc1.{p}"),
    ("<E>.blocks.{b}.mlp.reduce.{p}", "<B>.mlp.c_proj.{p}", "<V>.encoder.layers.{b}.mlp.fc2.{p}"),
    (
        "<D>.projection.linear.{p}",
        "textual.visual_projection.0.{p}",
        "git.visual_projection.visual_projection.0.{p}",
    ),
    (
        "<D>.projection.norm.{p}",
        "textual.visual_projection.1.{p}",
        "git.visual_projection.visual_projection.1.{p}",
    ),
    (
        "<D>.embedding.words.weight",
        "textual.embedding.words.weight",
        "git.embeddings.word_embeddings.weight",
    ),
    (
        "<D>.embedding.positions.weight",
        "textual.embedding.positions.weight",
        "git.embeddings.position_embeddings.weight",
    ),
    (
        "<D>.embedding.norm.{p}",
        "textual.embedding.layer_norm.{p}",
        "git.embeddings.LayerNorm.{p}",
    ),
    *(
        (
            f"<D>.layers.{{l}}.{ours}.{{p}}",
            f"textual.transformer.encoder.layer.{{l}}.{theirs}.{{p}}",
            f"git.encoder.layer.{{l}}.{theirs}.{{p}}",
        )
        for ours, theirs in (
            ("attention.query", "attention.self.query"),
            ("attention.key", "attention.self.key"),
            ("attention.value", "attention.self.value"),
            ("attention.output", "attention.output.dense"),
            ("norm_attention", "attention.output.LayerNorm"),
            ("expand", "intermediate.dense"),
            ("reduce", "output.dense"),
            ("norm_mlp", "output.LayerNorm"),
        )
    ),
    ("<D>.output.{p}", "textual.output.{p}", "output.{p}"),
)

_WORDS = {
    "B": "<I>.transformer.resblocks.{b}",
    "I": "image_encoder",
    "V": "git.image_encoder.vision_model",
}

# Held by some files, but no part of what the model computes.
_IGNORED = re.compile(r"(.*\.)?position_ids|image_encoder\.proj")
# Word embeddings and the output matrix, which some files hold once.
_TIED = {
    "original": ("textual.embedding.words.weight", "textual.output.weight"),
    "transformers": ("git.embeddings.word_embeddings.weight", "output.weight"),
}
# A vector per frame in models of clips, which have one tensor for all of them here: <D>.temporal.
# transformers spelled it as the original does, up to 4.48.
_TEMPORAL = re.compile(r"(git\.)?img_temp[eo]ral_embedding\.(\d+)")
_TEMPORAL_NAMES = {
    "original": "img_temperal_embedding.{}",
    "transformers": "git.img_temporal_embedding.{}",
}


def detect_format(names: Iterable[str]) -> Format:
    """Which of the two formats the tensor names are.

    Raises:
        ValueError: neither.
    """
    names = [name.removeprefix("module.") for name in names]
    if any(name.startswith("git.") for name in names):
        return "transformers"
    if any(name.startswith("textual.") for name in names):
        return "original"
    raise ValueError(
        "these are not weights of GIT: no tensor name starts with `git.` (transformers) or "
        f"`textual.` (original); the file has {', '.join(sorted(names)[:5]) or 'no tensors'}"
    )


def import_git(
    state: Mapping[str, Tensor], encoder: str = "image", task: str = "caption"
) -> dict[str, Tensor]:
    """Foreign GIT weights under our names.

    state: a state dict of `microsoft/GenerativeImage2Text` (with or without the `module.` that
        data-parallel training left in the names) or of transformers' `GitForCausalLM`.
    encoder, task: names of the encoder and the captioning task in the recipe.

    Returns name -> tensor as in `model.named_parameters()`: the output matrix is left out when it
    is, or equals, the word embeddings (`tied_output: true`).

    Raises:
        ValueError: tensors are missing or unknown.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    source = detect_format(state)
    frames = _frames(state)
    state = {name: tensor for name, tensor in state.items() if not _TEMPORAL.fullmatch(name)}
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.fullmatch(name)}
    words, output = _TIED[source]
    if words in state:
        state.setdefault(output, state[words])
    ours = _key_map(source, encoder, task).to_ours(state)
    decoder = _prefixes(encoder, task)["D"]
    if frames:
        ours[f"{decoder}.temporal.vectors"] = torch.cat(frames)
    if torch.equal(ours[f"{decoder}.output.weight"], ours[f"{decoder}.embedding.words.weight"]):
        del ours[f"{decoder}.output.weight"]
    return ours


def export_git(
    tensors: Mapping[str, Tensor],
    target: Format,
    encoder: str = "image",
    task: str = "caption",
) -> dict[str, Tensor]:
    """Our weights under foreign names: the inverse of `import_git`.

    tensors: a model's tensors under our names; those of other encoders and tasks are left out.
    The output matrix is always part of the result; tied, it is the word embeddings' own tensor.

    Raises:
        ValueError: tensors are missing, or of no counterpart in a GIT model.
    """
    prefixes = _prefixes(encoder, task)
    chosen = tuple(f"{prefix}." for prefix in prefixes.values())
    ours = {name: tensor for name, tensor in tensors.items() if name.startswith(chosen)}
    if not ours:
        raise ValueError(
            f"no tensor belongs to encoder {encoder!r} and task {task!r}; the checkpoint has "
            + (", ".join(sorted({".".join(name.split(".")[:2]) for name in tensors})) or "nothing")
        )
    decoder = prefixes["D"]
    words, output = f"{decoder}.embedding.words.weight", f"{decoder}.output.weight"
    if words in ours:
        ours.setdefault(output, ours[words])
    frames = ours.pop(f"{decoder}.temporal.vectors", None)
    foreign = _key_map(target, encoder, task).to_theirs(ours)
    if frames is not None:
        name = _TEMPORAL_NAMES[target]
        foreign |= {name.format(i): part for i, part in enumerate(frames.split(1))}
    return foreign


def _frames(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The vectors of frames, in their order, each (1, 1, visual_width); none in an image model."""
    found = {
        int(match[2]): tensor
        for name, tensor in state.items()
        if (match := _TEMPORAL.fullmatch(name))
    }
    if set(found) != set(range(len(found))):
        raise ValueError(
            f"not a complete GIT model: there are temporal embeddings of frames {sorted(found)}"
        )
    return [found[number] for number in range(len(found))]


def _prefixes(encoder: str, task: str) -> dict[str, str]:
    return {"E": f"encoders.{encoder}", "D": f"objectives.{task}.decoder"}


def _key_map(other: Format, encoder: str, task: str) -> KeyMap:
    """The table for these names of encoder and task."""
    column = 1 if other == "original" else 2
    rules = [(row[0], row[column]) for row in _TABLE]
    return KeyMap(rules, _prefixes(encoder, task) | _WORDS, model="GIT model", theirs=other)
