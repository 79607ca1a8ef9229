"""What every encoder promises (`models/encoder.py`), held by each of those that there are."""

import pytest
import torch

from pretrain.models.encoder import Encoder
from pretrain.models.init import initialise
from pretrain.models.text import TextEncoder
from pretrain.models.vit import VisionTransformer
from tests.pretrain.models.internimage.internimage_models import SMALL_PROJECTOR, small_encoder

SIDES = (64, 96)
OUTPUTS = {
    "vit": {"tokens", "cells", "maps"},
    "internimage": {"tokens", "maps"},
    "conv": {"tokens", "maps", "pooled"},
    "projector": {"tokens", "cells", "maps", "pooled"},
    "text": {"tokens", "pooled"},
    "text_mean": {"tokens", "pooled"},
}


def encoder_of(kind: str) -> tuple[Encoder, torch.Tensor]:
    """An encoder in evaluation, and a batch of two for it."""
    if kind.startswith("text"):
        encoder = TextEncoder(
            30,
            2,
            12,
            1,
            2,
            max_positions=16,
            causal=kind == "text",
            pool="end" if kind == "text" else "mean",
        )
        inputs = torch.tensor([[1, 5, 6, 2, 9, 9], [1, 7, 8, 9, 3, 2]])
    else:
        head = {"conv": {"type": "conv"}, "projector": SMALL_PROJECTOR}.get(kind)
        encoder = VisionTransformer(32, 8, 24, 2, 2) if kind == "vit" else small_encoder(head=head)
        inputs = torch.randn(2, 3, *SIDES, generator=torch.Generator().manual_seed(0))
    initialise(encoder, 0)
    return encoder.eval(), inputs


@pytest.mark.parametrize("kind", OUTPUTS)
@torch.no_grad()
def test_outputs_are_what_the_encoder_says_of_them(kind):
    encoder, inputs = encoder_of(kind)
    size = SIDES if inputs.dim() == 4 else inputs.shape[1:]
    alone = {want: getattr(encoder.encode(inputs, (want,)), want) for want in OUTPUTS[kind]}
    together = encoder.encode(inputs, OUTPUTS[kind])
    for want, found in alone.items():
        for one, other in zip(found, getattr(together, want), strict=True):
            assert torch.equal(one, other), want
        assert encoder.flops(*size, want=want) > 0
    main = alone["pooled"] if kind.startswith("text") else alone["tokens"]
    assert torch.equal(encoder(inputs), main)  # the bits of forward are those of encode
    assert alone["tokens"].shape[-1] == encoder.width
    if "pooled" in alone:
        assert alone["pooled"].shape == (2, encoder.pooled_width)
    if "cells" in alone:
        grid = encoder.grid("cells")
        rows, columns = grid.sides(*size)
        assert alone["cells"].shape == (2, rows * columns, grid.width)
    if "maps" in alone:
        places = [(2, *grid.sides(*size), grid.width) for grid in encoder.map_grids()]
        assert [tuple(found.shape) for found in alone["maps"]] == places
    if encoder.pools_cells:
        pooled = encoder.normed(encoder.pool_cells(alone["cells"]))
        torch.testing.assert_close(pooled, alone["pooled"])


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_an_encoder_does_not_have_is_an_error(kind):
    encoder, inputs = encoder_of(kind)
    for want in {"tokens", "cells", "maps", "pooled"} - OUTPUTS[kind]:
        with pytest.raises(ValueError, match=rf"no {want}|no head|joined maps of its projector"):
            encoder.encode(inputs, (want,))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_parameter_belongs_to_one_layer(kind):
    encoder, _ = encoder_of(kind)
    for name, _ in encoder.named_parameters():
        layers = [
            depth
            for depth, prefixes in enumerate(encoder.layer_names())
            if any(name == p or name.startswith(f"{p}.") for p in prefixes)
        ]
        assert len(layers) == 1, name


def test_vectors_of_a_text_are_of_its_tokens_and_their_mask_ends_at_eos():
    """What stands behind EOS changes nothing, and the feature is one of these vectors."""
    encoder, texts = encoder_of("text")
    other = texts.clone()
    other[0, 4:] = 11
    first, second = (encoder.encode(t, ("tokens", "pooled")) for t in (texts, other))
    assert first.mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    torch.testing.assert_close(first.tokens[first.mask], second.tokens[second.mask])
    torch.testing.assert_close(first.pooled, first.tokens[[0, 1], [3, 5]])
    with pytest.raises(ValueError, match="nothing joins the tokens of a text"):
        encoder.encode(texts, ("tokens",), joined=torch.zeros(1))
