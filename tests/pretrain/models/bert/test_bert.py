"""The BERT-like text encoder: RobertaModel and BertModel as oracles, folders, masks."""

import pytest
import torch

from pretrain.models.bert.settings import BertSettings
from pretrain.models.bert.weights import load_folder, to_ours, to_theirs
from pretrain.models.init import initialise
from tests.pretrain.contexts import text_context

WORDS, PAD, EOS = 40, 1, 2


def oracle(layout: str):
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    shape = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if layout == "bert":
        return BertModel(BertConfig(**shape, max_position_embeddings=12, pad_token_id=PAD)).eval()
    return RobertaModel(
        RobertaConfig(
            **shape,
            max_position_embeddings=14,
            type_vocab_size=1,
            pad_token_id=PAD,
            layer_norm_eps=1e-5,
        )
    ).eval()


def texts() -> torch.Tensor:
    return torch.tensor([[0, 5, 6, EOS, PAD, PAD], [0, 7, 8, 9, 4, EOS], [0, EOS, *[PAD] * 4]])


def context():
    found = text_context(WORDS, EOS)
    found.vocabulary.pad_id = PAD
    return found


@pytest.mark.parametrize("layout", ["roberta", "bert"])
def test_equals_transformers_from_a_local_folder(layout, tmp_path):
    theirs = oracle(layout)
    theirs.save_pretrained(tmp_path)
    settings, weights = load_folder(tmp_path)
    assert settings.max_positions == 12
    ours = settings.build(context()).eval()
    ours.load_state_dict(weights)
    there = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]])
    expected = theirs(texts(), attention_mask=there).last_hidden_state
    found, mask = ours.sequence(texts())
    assert torch.equal(mask, there.bool())
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(texts()), expected[:, 0], rtol=1e-5, atol=1e-5)
    encoded = ours.encode(texts(), ["tokens", "pooled"])
    torch.testing.assert_close(encoded.tokens[encoded.mask], expected[mask], rtol=1e-5, atol=1e-5)
    back = to_theirs(weights)
    state = {n: t for n, t in theirs.state_dict().items() if "pooler" not in n}
    assert back.keys() <= state.keys()
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_roberta_base_has_its_parameters():
    found = context()
    found.vocabulary.vocab_size = 50_265
    with torch.device("meta"):
        encoder = BertSettings().build(found)
    assert sum(p.numel() for p in encoder.parameters()) == 124_055_040


def small(**changes):
    shape = {"width": 16, "layers": 2, "heads": 2, "hidden": 32, "max_positions": 12}
    encoder = BertSettings(**shape | changes).build(context())
    initialise(encoder, 0)
    return encoder


def test_causal_texts_do_not_tell_what_comes_next():
    encoder, tokens = small().eval(), texts()[1:2]
    before, _ = encoder.sequence(tokens, causal=True)
    other = tokens.clone()
    other[:, 3] = 11
    after, _ = encoder.sequence(other, causal=True)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(-1).min() > 1e-3
    seen, _ = encoder.sequence(other)
    assert (seen - encoder.sequence(tokens)[0]).abs().amax(-1).min() > 1e-4


def test_documents_and_padding_are_not_seen():
    encoder, tokens = small().eval(), torch.tensor([[0, 5, EOS, 0, 6, EOS, PAD]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    found, _ = encoder.sequence(tokens, tokens != PAD, documents=documents)
    other = tokens.clone()
    other[:, 4], other[:, 6] = 9, 9
    changed, _ = encoder.sequence(other, tokens != PAD, documents=documents)
    torch.testing.assert_close(changed[:, :3], found[:, :3])
    assert found.isfinite().all()


def test_recomputation_changes_no_gradient():
    gradients = []
    for encoder in (small(), small(gradient_checkpointing=True)):
        encoder.sequence(texts())[0].square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not the config of a transformers model"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(ValueError, match="model_type is 'gpt2', and not roberta or bert"):
        load_folder(tmp_path)
    oracle("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="tensors are missing"):
        to_ours({"embeddings.word_embeddings.weight": torch.zeros(2, 2)})


def test_too_long_texts_and_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="a text of 13 tokens does not fit into max_positions 12"):
        small()(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"heads \(5\) must divide width \(768\)"):
        BertSettings(heads=5)
