"""What M3I asks of image encoders: dense features, what joins behind the stem, groups of tokens."""

import pytest
import torch

from pretrain.models.init import initialise
from pretrain.models.internimage.heads import AttentionPool
from pretrain.models.pooling import masked_mean
from pretrain.models.vit import VisionTransformer
from tests.pretrain.models.internimage.internimage_models import SMALL_PROJECTOR, small_encoder


def vit() -> VisionTransformer:
    encoder = VisionTransformer(16, 4, 24, 2, 2, position_std=0.5)
    initialise(encoder, 0)
    return encoder


def images(*sides: int) -> torch.Tensor:
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0))


def test_a_vit_gives_its_patches():
    encoder = vit()
    x = images(16, 12)
    assert encoder.grid("cells").sides(16, 12) == encoder.grid("stem").sides(16, 12) == (4, 3)
    torch.testing.assert_close(encoder.encode(x, ("cells",)).cells, encoder(x)[:, 1:])
    assert encoder.flops(16, 12, want="cells") == encoder.flops(16, 12)


def test_an_internimage_gives_the_maps_that_its_projector_reads():
    encoder = small_encoder(head=SMALL_PROJECTOR).eval()
    x = images(64, 96)
    dense = encoder.encode(x, ("cells",)).cells
    rows, columns = encoder.grid("cells").sides(64, 96)
    assert dense.shape == (2, rows * columns, encoder.grid("cells").width) == (2, 24, 64)
    torch.testing.assert_close(
        encoder.fc_norm(encoder.clip_projector(dense)), encoder.encode(x, ("pooled",)).pooled
    )
    assert encoder.grid("stem").sides(64, 96) == (16, 24) and encoder.grid("stem").width == 16
    assert encoder.flops(64, 96, want="cells") < encoder.flops(64, 96, want="pooled")
    with pytest.raises(ValueError, match="cannot keep groups of tokens apart"):
        encoder.encode(x, ("cells",), groups=torch.zeros(2, 4, 6))
    for head in (None, {"type": "conv"}):
        with pytest.raises(ValueError, match="joined maps of its projector"):
            small_encoder(head=head).encode(x, ("cells",))


@pytest.mark.parametrize("kind", ["vit", "internimage"])
def test_what_joins_behind_the_stem(kind):
    """Zeros change nothing; for a ViT it is as if positions had grown by it."""
    encoder = vit() if kind == "vit" else small_encoder(head=SMALL_PROJECTOR).eval()
    x = images(16, 16) if kind == "vit" else images(64, 64)
    grid = encoder.grid("stem").sides(*x.shape[-2:])
    shape = (2, *grid, encoder.grid("stem").width)
    plain = encoder.encode(x, ("cells",)).cells
    same = encoder.encode(x, ("cells",), joined=torch.zeros(shape)).cells
    torch.testing.assert_close(same, plain)
    vector = torch.randn(encoder.grid("stem").width, generator=torch.Generator().manual_seed(1))
    found = encoder.encode(x, ("cells",), joined=vector.expand(shape)).cells
    assert (found - plain).abs().max() > 1e-2
    if kind == "vit":
        with torch.no_grad():
            encoder.embedding.positions[1:] += vector
        torch.testing.assert_close(encoder.encode(x, ("cells",)).cells, found)


def test_groups_see_their_own_tokens_alone():
    encoder, x = vit(), images(16, 16)
    groups = torch.zeros(2, 4, 4, dtype=torch.bool)
    groups[:, :2] = True
    other = x.clone()
    other[:, :, 8:] = 1.0
    one, two = (encoder.encode(y, ("tokens",), groups=groups).tokens for y in (x, other))
    torch.testing.assert_close(one[:, :9], two[:, :9])  # the class token and the upper half
    assert (one[:, 9:] - two[:, 9:]).abs().max() > 1e-2
    encoder.gradient_checkpointing = True
    found = encoder.encode(x, ("tokens",), groups=groups).tokens
    torch.testing.assert_close(found, one)
    whole = torch.zeros(2, 4, 4)
    together = encoder.encode(x, ("cells",), groups=whole).cells
    assert (together - encoder.encode(x, ("cells",)).cells).abs().max() > 1e-4
    with torch.no_grad():  # the class token is seen by all
        encoder.embedding.class_token[..., :4] += 1.0
    found = encoder.encode(x, ("tokens",), groups=groups).tokens
    assert ((found - one)[:, 1:].abs().amax(-1) > 1e-4).all()


def test_pooling_of_some_tokens_equals_pooling_of_them_alone():
    tokens = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(3, 10, dtype=torch.bool)
    own[:, 2:7] = True
    torch.testing.assert_close(masked_mean(tokens, own), tokens[:, 2:7].mean(1))
    torch.testing.assert_close(masked_mean(tokens, None), tokens.mean(1))
    pool = AttentionPool(16, 4, 8)
    initialise(pool, 0)
    torch.testing.assert_close(pool(tokens, own), pool(tokens[:, 2:7]))
    assert (pool(tokens, own) - pool(tokens)).abs().max() > 1e-5
