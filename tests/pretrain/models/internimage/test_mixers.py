"""Token mixers against what they are defined by, position by position in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.init import initialise
from pretrain.models.internimage.mixers import DepthwiseConv, ReducedAttention, WindowAttention
from tests.pretrain.models.internimage.internimage_models import small_settings

HEIGHT, WIDTH, CHANNELS, HEADS = 9, 7, 8, 2


def prepared(mixer: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, large enough that every term counts."""
    initialise(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0.0, 0.7, generator=generator)
    return mixer.double().eval()


def picture(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, height, width, CHANNELS, dtype=torch.float64, generator=generator)


def attend(query, keys, values, extra):
    """One query (heads, d) over keys and values (n, heads, d), with scores (heads, n) added."""
    scores = torch.einsum("hd,nhd->hn", query, keys) * query.shape[-1] ** -0.5 + extra
    return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values).flatten()


@pytest.mark.parametrize("query_positions", [False, True])
@pytest.mark.parametrize("halo, shift", [(0, 0), (0, 2), (1, 0), (3, 0), (2, 1)])
@torch.no_grad()
def test_window_attention(halo, shift, query_positions):
    window = 4
    mixer = prepared(WindowAttention(CHANNELS, HEADS, window, halo, shift, query_positions))
    x = picture()
    q, k, v = mixer.query_key_value(x).unflatten(-1, (3, HEADS, -1)).unbind(3)
    far = window + halo - 1
    mixed = torch.empty_like(x)
    for b, y, z in itertools.product(range(2), range(HEIGHT), range(WIDTH)):
        # The window of this position: its first row and column, which may lie before the map.
        top, left = ((place + shift) // window * window - shift for place in (y, z))
        seen = [
            (j, i)
            for j in range(max(0, top - halo), min(HEIGHT, top + window + halo))
            for i in range(max(0, left - halo), min(WIDTH, left + window + halo))
        ]
        rows, columns = (torch.tensor(side) for side in zip(*seen, strict=True))
        dy, dx = rows - y + far, columns - z + far
        if query_positions:
            extra = q[b, y, z] @ (mixer.rows[dy] + mixer.columns[dx]).T
        else:
            extra = mixer.biases[:, dy, dx]
        mixed[b, y, z] = attend(q[b, y, z], k[b, rows, columns], v[b, rows, columns], extra)
    torch.testing.assert_close(mixer(x), mixer.output_proj(mixed))


@pytest.mark.parametrize("reduction", [1, 2, 4])
@torch.no_grad()
def test_reduced_attention(reduction):
    mixer = prepared(ReducedAttention(CHANNELS, HEADS, reduction))
    x = picture()
    small = x.flatten(1, 2)
    if reduction > 1:
        padded = F.pad(x, (0, 0, 0, -WIDTH % reduction, 0, -HEIGHT % reduction))
        patches = F.unfold(padded.permute(0, 3, 1, 2), reduction, stride=reduction)
        weight = mixer.reduce.weight.flatten(1)
        small = F.layer_norm(
            patches.transpose(1, 2) @ weight.T + mixer.reduce.bias,
            (CHANNELS,),
            mixer.norm[0].weight,
            mixer.norm[0].bias,
            1e-6,
        )
    k, v = mixer.key_value(small).unflatten(-1, (2, HEADS, -1)).unbind(2)
    q = mixer.query(x).unflatten(-1, (HEADS, -1))
    mixed = torch.empty_like(x)
    for b, y, z in itertools.product(range(2), range(HEIGHT), range(WIDTH)):
        mixed[b, y, z] = attend(q[b, y, z], k[b], v[b], 0.0)
    torch.testing.assert_close(mixer(x), mixer.output_proj(mixed))


@torch.no_grad()
def test_depthwise_convolution():
    mixer = prepared(DepthwiseConv(CHANNELS, 5))
    x = picture()
    value = F.pad(mixer.input_proj(x), (0, 0, 2, 2, 2, 2))
    wanted = mixer.convolution.bias.expand_as(x).clone()
    for j, i in itertools.product(range(5), range(5)):
        tap = mixer.convolution.weight[:, 0, j, i]
        wanted += tap * value[:, j : j + HEIGHT, i : i + WIDTH]
    torch.testing.assert_close(mixer(x), mixer.output_proj(wanted))


def test_every_other_layer_shifts_its_windows():
    encoder = small_settings(mixer={"type": "shifted_window", "window": 6}).build()
    assert [b.token_mixer.shift for b in encoder.levels[2].blocks] == [0, 3]
    encoder = small_settings(mixer={"type": "reduced_attention", "reductions": (8, 4, 2, 1)})
    reductions = [level.blocks[0].token_mixer.reduction for level in encoder.build().levels]
    assert reductions == [8, 4, 2, 1]


@pytest.mark.parametrize(
    "mixer",
    [
        {"type": "halo", "window": 3, "halo": 1},
        {"type": "shifted_window", "window": 3},
        {"type": "reduced_attention"},
        {"type": "depthwise_conv", "kernel_size": 3},
        {"type": "dcnv3"},
    ],
)
def test_blocks_of_all_mixers_learn(mixer):
    """Every parameter gets a gradient, in the same block."""
    encoder = small_settings(
        mixer=mixer, layer_scale=0.5, depths=(1, 1, 2, 1), groups=(1, 1, 2, 2)
    ).build()
    initialise(encoder, 0)
    with torch.no_grad():  # off the regular grid, where offsets have one-sided gradients
        for name, parameter in encoder.named_parameters():
            if ".offset." in name or ".mask." in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(0)
    encoder(torch.randn(2, 3, 64, 64, generator=generator)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().max() > 0 or name.endswith("key_value.bias"), name
