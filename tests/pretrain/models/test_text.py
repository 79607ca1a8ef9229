"""The text encoder: transformers' CLIP as an oracle, padding, and what recipes ask of it."""

import pytest
import torch
from pydantic import ValidationError

from pretrain.models.init import initialise
from pretrain.models.text import TextEncoder, TextEncoderSettings, end_of_text
from tests.pretrain.contexts import text_context

WORDS, EOS = 30, 2


def small(**changes) -> TextEncoder:
    shape = {"width": 16, "layers": 2, "heads": 2, "max_positions": 12}
    encoder = TextEncoderSettings(**shape | changes).build(text_context(WORDS, EOS))
    initialise(encoder, 0)
    return encoder


def texts() -> torch.Tensor:
    return torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 4, 2], [1, 2, 0, 0, 0, 0]])


def clip_names(layers: int) -> dict[str, str]:
    """Their name -> ours, of one-to-one tensors."""
    names = {
        "embeddings.token_embedding.weight": "embedding.words.weight",
        "embeddings.position_embedding.weight": "embedding.positions",
        "final_layer_norm.weight": "norm.weight",
        "final_layer_norm.bias": "norm.bias",
    }
    parts = {
        "layer_norm1": "norm_attention",
        "layer_norm2": "norm_mlp",
        "mlp.fc1": "mlp.expand",
        "mlp.fc2": "mlp.reduce",
        "self_attn.out_proj": "attention.output",
    }
    for i in range(layers):
        for theirs, ours in parts.items():
            for leaf in ("weight", "bias"):
                names[f"encoder.layers.{i}.{theirs}.{leaf}"] = f"blocks.{i}.{ours}.{leaf}"
    return names


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers_clip(activation):
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = small(activation=activation, position_std=0.5).eval()
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            hidden_act=activation,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    ours = dict(encoder.named_parameters())
    weights = {name: ours[mine] for name, mine in clip_names(2).items()}
    for i in range(2):
        for leaf in ("weight", "bias"):
            thirds = ours[f"blocks.{i}.attention.qkv.{leaf}"].chunk(3)
            for name, third in zip("qkv", thirds, strict=True):
                weights[f"encoder.layers.{i}.self_attn.{name}_proj.{leaf}"] = third
    prefix = "text_model." if hasattr(theirs, "text_model") else ""
    theirs.load_state_dict({prefix + name: value for name, value in weights.items()})
    # With eos_token_id 2 theirs pools at the largest id, for the sake of an old mistake.
    expected = theirs(texts()).last_hidden_state[torch.arange(3), end_of_text(texts(), EOS)]
    torch.testing.assert_close(encoder(texts()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["end", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_follows_the_end_changes_nothing(causal, pool):
    encoder = small(causal=causal, position_std=0.5, pool=pool)
    one = encoder(texts())
    assert one.shape == (3, 16)
    other = texts()
    other[0, 4:], other[2, 2:] = 11, EOS
    torch.testing.assert_close(encoder(other), one, rtol=1e-5, atol=1e-6)
    longer = torch.cat([texts(), torch.full((3, 4), 9)], dim=1)
    torch.testing.assert_close(encoder(longer), one, rtol=1e-5, atol=1e-6)
    changed = texts()
    changed[:, 0] = 3
    assert (encoder(changed) - one).abs().amax(dim=1).min() > 1e-4


def test_the_mean_is_over_the_tokens_of_the_text():
    """A causal encoder gives each token the feature of the text that ends there."""
    encoder, mean = small(position_std=0.5), small(position_std=0.5, pool="mean")
    text = texts()[1:2]
    encoder.eos_id = -1  # no token, so that texts end with their last one
    hidden = [encoder(text[:, :length]) for length in range(1, 7)]
    torch.testing.assert_close(mean(text)[0], torch.cat(hidden).mean(0), rtol=1e-5, atol=1e-6)


def test_causal_and_bidirectional_differ():
    causal, both = small(position_std=0.5), small(causal=False, position_std=0.5)
    assert not torch.allclose(causal(texts())[1], both(texts())[1], atol=1e-4)


def test_end_of_text():
    tokens = torch.tensor([[2, 5, 2, 2], [2, 2, 7, 7], [1, 5, 6, 7]])
    assert end_of_text(tokens, 2).tolist() == [2, 1, 3]


def test_recomputation_and_dropout():
    plain, saving = small(dropout=0.3), small(dropout=0.3, gradient_checkpointing=True)
    gradients = []
    for encoder in (plain, saving):
        torch.manual_seed(4)
        encoder(texts()).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(plain(texts()), plain(texts()))
    plain.eval()
    assert torch.equal(plain(texts()), plain(texts()))


def test_every_parameter_has_a_first_value_and_a_dimension():
    encoder = small(position_std=0.2)
    assert all(parameter.dim() for parameter in encoder.parameters())
    assert encoder.embedding.positions.std().item() == pytest.approx(0.2, rel=0.2)
    assert encoder.embedding.words.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_flops_count_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    encoder = small()
    with FlopCounterMode(display=False) as counter:
        encoder(texts()[:1])
    # The counter leaves attention itself out on the CPU: two products of 6 x 6 x 16 in 2 layers.
    attention = 2 * (2 * 2 * 6 * 6 * 16)
    assert encoder.flops(6) in (counter.get_total_flops(), counter.get_total_flops() + attention)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValidationError, match=r"heads \(3\) must divide width \(512\)"):
        TextEncoderSettings(heads=3)
    with pytest.raises(ValueError, match="a text of 13 tokens does not fit into max_positions 12"):
        small()(torch.ones(1, 13, dtype=torch.int64))
