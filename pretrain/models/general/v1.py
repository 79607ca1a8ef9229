"""Weights of the released Uni-Perceiver and Uni-Perceiver-MoE, to our names.

Their model has no encoders: embeddings of words (`type: bert` without layers) and of patches
(`type: patches`) go straight into the decoder. Their `<SPE>` is a word whose embedding is only
normalised: here it is one learned vector, that result; and so are the queries of captioning, which
are the same word with a position.
"""

from collections.abc import Mapping
from typing import get_args

import torch.nn.functional as F
from torch import Tensor

from pretrain.models.general.decoder import Family
from pretrain.models.key_map import KeyMap

_FAMILIES: dict[str, str] = {
    "classification": "img_cls",
    "caption": "caption",
    "mlm": "text_mlm",
    "retrieval": "retrieve",
}
"""Family of tasks -> their name of its temperature. They have none of regions."""

_TEXT = (
    ("<T>.embedding.words.weight", "token_embed.embeddings.weight"),
    ("<T>.embedding.positions", "token_embed.embeddings_pos.position_embeddings.weight"),
    ("<T>.embedding.types", "token_embed.embeddings_token_type.weight"),
    ("<T>.embedding.norm.{p}", "token_embed.embeddings_norm.{p}"),
)
_IMAGE = (
    ("<I>.patches.{p}", "video_embed.embeddings.{p}"),
    ("<I>.positions", "video_embed.embeddings_st_pos.spatial_pos_embed.weight"),
    ("<I>.norm.{p}", "video_embed.embeddings_norm.{p}"),
)
_OUTPUT = (
    ("<D>.output.norm.{p}", "loss_prepare.ln_post.{p}"),
    ("<D>.output.linear.{p}", "loss_prepare.proj.{p}"),
)


def to_ours(
    state: Mapping[str, Tensor], special_id: int, image: str, text: str, decoder: str
) -> dict[str, Tensor]:
    """Their tensors under our names, for images without time.

    special_id: number of their word `<SPE>`. image, text, decoder: prefixes of our names.

    Raises ValueError: tensors are missing, or unknown.
    """
    state = dict(state)
    # A type that their forward pass does not read, and the time of the first frame, which is added
    # to every patch alike.
    state.pop("video_embed.embeddings_type.weight")
    time = state.pop("video_embed.embeddings_st_pos.temporal_pos_embed.weight")[0]
    state["video_embed.embeddings.bias"] = state["video_embed.embeddings.bias"] + time
    scales = {name: state.pop(name) for name in list(state) if "logit_scale_" in name}
    for name in list(state):
        # Both layers of attention, and both of the MLP, follow the first one's decision.
        if ".dense.gate." in name or ".linear2.gate." in name:
            del state[name]
    words = {"I": image, "T": text, "D": decoder}
    rules = (*_TEXT, *_IMAGE, *_OUTPUT, *_layer_rules(state))
    result = KeyMap(rules, words, model="Uni-Perceiver", theirs="Uni-Perceiver").to_ours(state)
    vector, positions = _special(result, text, special_id)
    result[f"{decoder}.special.vector"] = vector
    result[f"{decoder}.special.positions"] = positions
    for family in get_args(Family):
        theirs = _FAMILIES.get(family, "img_cls")
        result[f"{decoder}.scales.{family}.log_scale"] = scales[
            f"loss_prepare.logit_scale_{theirs}"
        ].reshape(1)
    return result


def _special(ours: Mapping[str, Tensor], text: str, special_id: int) -> tuple[Tensor, Tensor]:
    """Our `<SPE>` (D,), and what a position adds to it (T, D)."""
    table = {name: ours[f"{text}.embedding.{name}"] for name in ("positions", "types")}
    word = ours[f"{text}.embedding.words.weight"][special_id]
    norm = [ours[f"{text}.embedding.norm.{name}"] for name in ("weight", "bias")]

    def normed(vectors: Tensor) -> Tensor:
        return F.layer_norm(vectors, vectors.shape[-1:], *norm)

    vector = normed(word)
    return vector, normed(word + table["positions"] + table["types"][0]) - vector


def _layer_rules(state: Mapping[str, Tensor]) -> list[tuple[str, str | tuple[str, ...]]]:
    """Rules of every layer that there is, with as many experts as it has."""
    numbers = {int(name.split(".")[2]) for name in state if name.startswith("fused_encoder.")}
    rules: list[tuple[str, str | tuple[str, ...]]] = []
    for number in sorted(numbers):
        ours, theirs = f"<D>.layers.{number}", f"fused_encoder.layers.{number}"
        rules += [
            (f"{ours}.scale_attention", f"{theirs}.gamma_1"),
            (f"{ours}.scale_mlp", f"{theirs}.gamma_2"),
            (f"{ours}.norm_attention.{{p}}", f"{theirs}.norm1.{{p}}"),
            (f"{ours}.norm_mlp.{{p}}", f"{theirs}.norm2.{{p}}"),
        ]
        if f"{theirs}.self_attn.in_proj_weight" in state:
            rules += [
                (f"{ours}.qkv.{leaf}", f"{theirs}.self_attn.in_proj_{leaf}")
                for leaf in ("weight", "bias")
            ]
            names = (("output", "self_attn.out_proj"),)
        else:
            names = (("qkv", "self_attn.qkv_proj"), ("output", "self_attn.dense"))
        for name, other in (*names, ("expand", "linear1"), ("reduce", "linear2")):
            rules += _linear_rules(state, f"{ours}.{name}", f"{theirs}.{other}")
        routers = (("attention_router", "self_attn.qkv_proj"), ("mlp_router", "linear1"))
        for name, other in routers:
            if f"{theirs}.{other}.gate.wg.weight" in state:
                rules += [
                    (f"{ours}.{name}.code.{{p}}", f"{theirs}.{other}.gate.tag_transform.0.{{p}}"),
                    (f"{ours}.{name}.norm.{{p}}", f"{theirs}.{other}.gate.tag_transform.1.{{p}}"),
                    (f"{ours}.{name}.score.weight", f"{theirs}.{other}.gate.wg.weight"),
                ]
    return rules


def _linear_rules(
    state: Mapping[str, Tensor], ours: str, theirs: str
) -> list[tuple[str, str | tuple[str, ...]]]:
    """A linear layer, or all of its experts one behind the other."""
    experts = f"{theirs}.experts.deepspeed_experts"
    count = sum(f"{experts}.{e}.bias" in state for e in range(len(state)))
    if not count:
        return [(f"{ours}.{{p}}", f"{theirs}.{{p}}")]
    return [(f"{ours}.{{p}}", tuple(f"{experts}.{e}.{{p}}" for e in range(count)))]
