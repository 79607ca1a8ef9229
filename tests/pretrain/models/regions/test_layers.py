"""Layers against those of transformers' Deformable DETR, through a key map."""

import pytest
import torch
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoderLayer,
)

from pretrain.models.init import initialise
from pretrain.models.regions.boxes import map_centres
from pretrain.models.regions.layers import DecoderLayer, DeformableAttention, EncoderLayer
from tests.pretrain.models.regions.region_models import shake

SIZES = [(5, 6), (3, 3), (1, 2)]
PLACES = sum(height * width for height, width in SIZES)
WIDTH, HEADS, POINTS, HIDDEN = 32, 4, 3, 40
ENCODER_KEYS = {
    "self_attn_layer_norm": "norm1",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "final_layer_norm": "norm2",
}
DECODER_KEYS = {
    "self_attn_layer_norm": "norm2",
    "encoder_attn_layer_norm": "norm1",
    "encoder_attn": "cross_attn",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "final_layer_norm": "norm3",
    "self_attn.o_proj": "self_attn.out_proj",
}


def config() -> DeformableDetrConfig:
    made = DeformableDetrConfig(
        d_model=WIDTH,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        encoder_n_points=POINTS,
        decoder_n_points=POINTS,
        num_feature_levels=len(SIZES),
        dropout=0.0,
        activation_function="relu",
    )
    made._attn_implementation = "eager"
    return made


def copied(theirs: torch.nn.Module, ours: torch.nn.Module, keys: dict[str, str]) -> None:
    shake(theirs)
    state: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {"weight": [], "bias": []}
    for name, value in theirs.state_dict().items():
        if name.startswith("self_attn.") and name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
            continue
        for old, new in keys.items():
            if name.startswith(old + "."):
                name = new + name[len(old) :]
                break
        state[name] = value
    if hasattr(theirs.self_attn, "q_proj"):
        for kind in parts:
            values = [
                getattr(getattr(theirs.self_attn, n), kind) for n in ("q_proj", "k_proj", "v_proj")
            ]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(values)
    ours.load_state_dict(state)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def common() -> dict:
    starts = torch.tensor([0, *(h * w for h, w in SIZES)]).cumsum(0)[:-1]
    return {
        "spatial_shapes": torch.tensor(SIZES),
        "spatial_shapes_list": SIZES,
        "level_start_index": starts,
    }


def compared(ours, theirs, ours_in: torch.Tensor, theirs_in: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = randn(*ours.shape, seed=9)
    gradients = [
        torch.autograd.grad((out * weight).sum(), x)[0]
        for out, x in ((ours, ours_in), (theirs, theirs_in))
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer(padded):
    theirs = DeformableDetrEncoderLayer(config()).eval()
    ours = EncoderLayer(WIDTH, HEADS, len(SIZES), POINTS, HIDDEN)
    copied(theirs, ours, ENCODER_KEYS)
    tokens, positions = randn(2, PLACES, WIDTH), randn(1, PLACES, WIDTH, seed=1)
    present = torch.ones(2, PLACES, dtype=torch.bool)
    if padded:
        present[1, ::3] = False
    references = map_centres(SIZES, tokens.device)[None]
    a, b = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    found = ours(a, positions, references, SIZES, present if padded else None)
    each_level = references[:, :, None].expand(2, -1, len(SIZES), -1)
    right = theirs(b, present, positions, each_level, **common())
    compared(found, right, a, b)


def test_decoder_layer():
    theirs = DeformableDetrDecoderLayer(config()).eval()
    ours = DecoderLayer(WIDTH, HEADS, len(SIZES), POINTS, HIDDEN)
    copied(theirs, ours, DECODER_KEYS)
    queries, positions = randn(2, 7, WIDTH), randn(2, 7, WIDTH, seed=1)
    memory, boxes = randn(2, PLACES, WIDTH, seed=2), randn(2, 7, 4, seed=3).sigmoid()
    present = torch.rand(2, PLACES, generator=torch.Generator().manual_seed(4)) > 0.2
    a, b = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    found = ours(a, positions, None, boxes, memory, SIZES, present)
    right = theirs(
        b,
        positions,
        boxes[:, :, None].expand(-1, -1, len(SIZES), -1),
        encoder_hidden_states=memory,
        encoder_attention_mask=present,
        **common(),
    )
    compared(found, right, a, b)


def test_masked_queries_are_not_seen():
    ours = DecoderLayer(WIDTH, HEADS, len(SIZES), POINTS, HIDDEN)
    initialise(ours, 0)
    shake(ours)
    queries, positions = randn(1, 5, WIDTH), randn(1, 5, WIDTH, seed=1)
    memory, boxes = randn(1, PLACES, WIDTH, seed=2), randn(1, 5, 4, seed=3).sigmoid()
    mask = torch.ones(1, 5, 5, dtype=torch.bool)
    mask[0, :3, 3:] = False
    with torch.no_grad():
        found = ours(queries, positions, mask, boxes, memory, SIZES, None)
        few = ours(queries[:, :3], positions[:, :3], None, boxes[:, :3], memory, SIZES, None)
    torch.testing.assert_close(found[:, :3], few, atol=1e-5, rtol=1e-5)


def test_first_offsets_are_a_star():
    """Head k looks in the direction 2 pi k / heads, point p at p + 1 pixels on the square."""
    ours = DeformableAttention(WIDTH, 4, 2, 3)
    initialise(ours, 0)
    bias = ours.sampling_offsets.bias.detach().view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level in range(2):
        for point in range(3):
            torch.testing.assert_close(
                bias[:, level, point], directions * (point + 1), atol=1e-6, rtol=0
            )
    assert not ours.sampling_offsets.weight.any() and not ours.attention_weights.weight.any()
