"""The general decoder: against BERT's layers, its experts, its noise, and decoding with a cache."""

import pytest
import torch

from pretrain.models.general.attributes import ATTRIBUTES, BITS
from pretrain.models.general.decoder import Part, caption_masks, folded
from pretrain.models.general.settings import ExpertSettings, GeneralDecoderSettings, PatchesSettings
from pretrain.models.init import initialise
from pretrain.models.step_draws import StepDraws


def small(**changes):
    shape = {"width": 16, "layers": 2, "heads": 2, "hidden": 32, "max_queries": 8}
    decoder = GeneralDecoderSettings(**shape | changes).build()
    initialise(decoder, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return decoder


def caption_parts(before: int, length: int, present=None) -> list[Part]:
    masks = caption_masks(length, before, present)
    sizes = (before, length, length)
    names = ("caption_image", "caption_text", "caption_text")
    return [
        Part(torch.randn(2, n, 16), name, mask)
        for n, name, mask in zip(sizes, names, masks, strict=True)
    ]


def test_dense_layers_are_those_of_bert():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    decoder = small(experts=None)
    theirs = BertEncoder(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            layer_norm_eps=1e-5,
            attn_implementation="eager",
        )
    ).eval()
    names = {
        "attention.output.dense": "output",
        "attention.output.LayerNorm": "norm_attention",
        "intermediate.dense": "expand",
        "output.dense": "reduce",
        "output.LayerNorm": "norm_mlp",
    }
    ours, weights = decoder.state_dict(), {}
    for layer in range(2):
        for leaf in ("weight", "bias"):
            thirds = ours[f"layers.{layer}.qkv.{leaf}"].chunk(3)
            for name, third in zip(("query", "key", "value"), thirds, strict=True):
                weights[f"layer.{layer}.attention.self.{name}.{leaf}"] = third
            for name, mine in names.items():
                weights[f"layer.{layer}.{name}.{leaf}"] = ours[f"layers.{layer}.{mine}.{leaf}"]
    theirs.load_state_dict(weights)
    tokens = torch.randn(3, 5, 16)
    torch.testing.assert_close(decoder(tokens), theirs(tokens)[0], rtol=1e-5, atol=1e-5)


def test_sizes_are_those_of_bert_base():
    """Six layers of BERT-base have 42.5 million parameters; experts add seven MLPs to each."""
    with torch.device("meta"):
        dense = GeneralDecoderSettings(experts=None).build()
        experts = GeneralDecoderSettings().build()
        numbers = [sum(p.numel() for p in m.layers.parameters()) for m in (dense, experts)]
        small_folded = GeneralDecoderSettings(experts=None).build()
    assert numbers[0] == 42_527_232
    mlp, router = 2 * 768 * 3072 + 3072 + 768, 8 * 768 + 768 + 2 * 768 + 8 * 768
    assert numbers[1] - numbers[0] == 6 * (7 * mlp + router)
    assert sum(p.numel() for p in small_folded.layers.parameters()) == numbers[0]


def test_folding_keeps_outputs_and_takes_one_matrix_per_attribute():
    decoder = small().eval()
    one, parts = folded(decoder, ["regions"]), [Part(torch.randn(2, 5, 16), "regions")]
    torch.testing.assert_close(one.run(parts), decoder.run(parts), rtol=1e-6, atol=1e-6)
    count = {d: sum(p.numel() for p in d.layers.parameters()) for d in (decoder, one)}
    assert count[one] == sum(p.numel() for p in small(experts=None).layers.parameters())
    mlp = 2 * 16 * 32 + 32 + 16
    assert count[decoder] - count[one] == 2 * (7 * mlp + 8 * 16 + 16 + 2 * 16 + 8 * 16)


def test_attributes_choose_experts_that_share_out_one():
    router = small().layers[0].mlp_router
    experts, shares = router()
    assert experts.shape == (len(ATTRIBUTES), 2)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(ATTRIBUTES)))
    assert len(set(BITS.values())) == len(ATTRIBUTES) == 7
    halved = router.bfloat16()()
    assert halved[1].dtype == torch.float32


def test_noise_is_that_of_the_step_and_only_in_training():
    decoder, parts = small(), [Part(torch.randn(2, 3, 16), "image")]
    draws = [StepDraws(1, "caption", step).generator("experts") for step in (4, 4, 5)]
    same, again, other = (decoder.run(parts, generator)[0] for generator in draws)
    assert torch.equal(same, again)
    assert not torch.allclose(same, other)
    quiet = decoder.run(parts)[0]
    assert not torch.allclose(same, quiet)
    decoder.eval()
    assert torch.equal(decoder.run(parts, draws[0])[0], quiet)


def test_recomputation_changes_no_gradient():
    parts = caption_parts(3, 4)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        decoder = small(gradient_checkpointing=recompute)
        generator = StepDraws(1, "caption", 4).generator("experts")
        decoder.run(parts, generator)[2].square().sum().backward()
        gradients.append([p.grad for p in decoder.layers.parameters()])
    assert all(g is not None for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_looks_ahead_and_padding_is_not_seen():
    decoder = small().eval()
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    parts = caption_parts(5, 4, present)
    before = decoder.run(parts)
    text, image = parts[1].tokens.clone(), parts[0].tokens.clone()
    text[:, 2] += 1  # the third word
    image[1, 3:] += 1  # padding
    changed = [parts[0]._replace(tokens=image), parts[1]._replace(tokens=text), parts[2]]
    after = decoder.run(changed)
    torch.testing.assert_close(after[0][:, :3], before[0][:, :3])
    torch.testing.assert_close(after[1][:, :2], before[1][:, :2])
    torch.testing.assert_close(after[2][:, :3], before[2][:, :3])
    assert (after[1][:, 2:] - before[1][:, 2:]).abs().amax(-1).min() > 1e-3
    assert (after[2][:, 3] - before[2][:, 3]).abs().amax(-1).min() > 1e-3


def test_decoding_with_a_cache_is_the_one_pass():
    decoder = small().eval()
    parts = caption_parts(3, 4)
    whole = decoder.run(parts)[2]
    _, (seen,) = decoder.run_cached([parts[0]], None)
    for word in range(4):
        query = Part(parts[2].tokens[:, word : word + 1], "caption_text")
        found, _ = decoder.run_cached([query], seen)
        torch.testing.assert_close(found[0][:, 0], whole[:, word], rtol=1e-5, atol=1e-5)
        known = Part(parts[1].tokens[:, word : word + 1], "caption_text")
        _, (added,) = decoder.run_cached([known], seen)
        seen = [
            tuple(torch.cat(pair, dim=2) for pair in zip(*both, strict=True))
            for both in zip(seen, added, strict=True)
        ]


def test_every_parameter_belongs_to_one_layer():
    for module in (small(layer_scale=0.1), PatchesSettings(image_size=32).build()):
        layers = [name for names in module.layer_names() for name in names]
        for name, parameter in module.named_parameters():
            owners = [layer for layer in layers if name == layer or name.startswith(layer + ".")]
            assert len(owners) == 1, name
            assert parameter.dim() > 0


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match=r"chosen \(9\) must not be above number \(8\)"):
        ExpertSettings(chosen=9)
    with pytest.raises(ValueError, match=r"temperature \(0\.001\) is below 1 / max_scale"):
        GeneralDecoderSettings(temperature=0.001)
    with pytest.raises(ValueError, match="a text of 9 tokens cannot be asked for by max_queries 8"):
        small().special(1, 9)
    patches = PatchesSettings(image_size=32).build()
    with pytest.raises(ValueError, match="images of 16 x 32 pixels do not fit the 32 x 32"):
        patches(torch.zeros(1, 3, 16, 32))
