"""Against reference values of transformers and of the original repository."""

import math

import pytest
import torch

from pretrain.models.git.beams import generate_beams
from pretrain.models.git.generation import generate_greedy
from pretrain.models.git.reading import Prompt
from pretrain.models.git.sampling import generate_words
from pretrain.models.git.trie import Trie
from pretrain.models.git.weights import export_git, import_git
from tests.pretrain.models.git.git_models import Golden

TRANSFORMERS = (
    "git_caption",
    "git_caption_untied",
    "git_multiscale_24x24",
    "git_multiscale_24x40",
    "git_multiscale_48x48",
    "git_video3",
    "git_video3_two_frames",
    "git_vqa",
)
CAPTIONS = (
    "git_caption",
    "git_caption_untied",
    "git_orig_caption",
    "git_video3",
    "git_orig_video3",
)
COMPLETE = (*CAPTIONS, "git_vqa", "git_orig_vqa")
close = dict(atol=1e-5, rtol=1e-4)


def mean_loss(golden: Golden, smoothing: float):
    """Mean loss and mean plain cross-entropy of a case, and the gradients of the former."""
    model = golden.model(smoothing)
    image_tokens = golden.encode(model)
    loss, cross_entropy, _ = model.objectives["caption"].token_sums(image_tokens, golden.text)
    count = int(golden.text["loss_mask"][..., 1:].sum())
    (loss / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item() / count, cross_entropy.item() / count, gradients


@pytest.mark.parametrize(
    "name", [*TRANSFORMERS, "git_orig_caption", "git_orig_video3", "git_orig_vqa"]
)
def test_logits(name: str) -> None:
    golden = Golden.load(name)
    model, expected = golden.model(0.1), golden.part("out")
    tokens = golden.text["tokens"]
    with torch.no_grad():
        image_tokens = golden.encode(model)
        decoder = model.objectives["caption"].decoder
        logits = decoder(image_tokens, tokens, torch.arange(tokens.numel()))
    if "vision_last_hidden_state" in expected:
        hidden = expected["vision_last_hidden_state"]
        if hidden.dim() == 4:  # of a clip, before the vectors of frames
            vectors = decoder.temporal.vectors.detach()[: hidden.shape[1]]
            hidden = (hidden + vectors).flatten(1, 2)
        torch.testing.assert_close(image_tokens, hidden, **close)
        projected = decoder.projection(image_tokens).detach()
        torch.testing.assert_close(projected, expected["projected_visual_features"], **close)
    wanted = expected["logits_text"] if "logits_text" in expected else expected["logits"]
    # transformers hides padding from padding itself; nothing supervised ever reads those places.
    real = golden.part("in").get("attention_mask", torch.ones_like(tokens[:, 0])) == 1
    torch.testing.assert_close(logits.view_as(wanted)[real], wanted[real], **close)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("kind", ["ce", "smooth"])
def test_losses_and_gradient_norms(name: str, kind: str) -> None:
    golden = Golden.load(name)
    expected = golden.info["train"]
    loss, cross_entropy, gradients = mean_loss(golden, 0.1 if kind == "smooth" else 0.0)
    key = "loss_ce" if kind == "ce" else "loss_smooth_kl_eps_over_v_minus_1"
    assert loss == pytest.approx(expected[key], abs=1e-5)
    assert cross_entropy == pytest.approx(expected["loss_ce"], abs=1e-5)
    foreign = export_git(gradients, "transformers")
    for parameter, norm in expected[f"grad_norm_{kind}"].items():
        assert float(foreign[parameter].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6)
    if kind == "ce":
        total = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients.values()))
        assert total == pytest.approx(expected["grad_norm_total_ce"], rel=1e-4)


@pytest.mark.parametrize("name", COMPLETE)
def test_gradients(name: str) -> None:
    golden = Golden.load(name)
    original = name.startswith("git_orig")
    loss, _, gradients = mean_loss(golden, 0.1 if original else 0.0)
    if original:
        assert loss == pytest.approx(golden.info["loss"], abs=1e-5)
    expected = import_git(golden.part("grad"))
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", CAPTIONS)
def test_greedy_ids(name: str) -> None:
    golden = Golden.load(name)
    model = golden.model(0.1)
    if name.startswith("git_orig"):
        expected = golden.info["hf_greedy_same_weights"]
    else:
        expected = golden.info["generate"]["greedy"]["sequences"]
    image_tokens = golden.encode(model)
    objective = model.objectives["caption"]
    ids = generate_greedy(
        objective.decoder,
        image_tokens,
        **objective.special_ids,
        max_new_tokens=len(expected[0]) - 1,
    )
    assert ids.tolist() == expected


SPECIAL = {"eos_id": 2, "pad_id": 0}


def words(ids) -> list[list[int]]:
    """Up to EOS, without what others fill the rows with."""
    rows = [list(row) for row in ids]
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


@pytest.mark.parametrize(("penalty", "key"), [(1.0, "beam4_lp1"), (0.6, "beam4_lp0.6")])
@pytest.mark.parametrize("name", ["git_caption", "git_caption_untied", "git_video3"])
def test_beams_of_transformers(name: str, penalty: float, key: str) -> None:
    golden = Golden.load(name)
    model = golden.model(0.1)
    image_tokens = golden.encode(model)
    ids, scores = generate_beams(
        model.objectives["caption"].decoder,
        image_tokens,
        Prompt.of_bos(len(image_tokens), 1, image_tokens.device),
        max_new_tokens=14,
        length_penalty=penalty,
        **SPECIAL,
    )
    expected = golden.info["generate"][key]
    assert words(ids.tolist()) == words(row[1:] for row in expected["sequences"])
    torch.testing.assert_close(scores, torch.tensor(expected["sequences_scores"]), **close)


@pytest.mark.parametrize("how", ["greedy", "beam4_lp1", "beam4_lp0.6"])
def test_answers_to_questions_of_different_length(how: str) -> None:
    """In one batch, padded on the right, as one by one and as padded on the left by others."""
    golden = Golden.load("git_vqa")
    model = golden.model(0.1)
    expected = [case[how] for case in golden.info["generate_single"]]
    left = golden.info["generate_left_padded"][how]["sequences"]
    mask = golden.part("in")["left_padded_mask"]
    prompts = [
        row[keep == 1].tolist()
        for row, keep in zip(golden.part("in")["left_padded_prefix"], mask, strict=True)
    ]
    arguments = (
        model.objectives["caption"].decoder,
        golden.encode(model),
        Prompt.of(prompts, 0, "cpu"),
    )
    if how == "greedy":
        ids, scores = generate_words(*arguments, max_new_tokens=14, **SPECIAL)
    else:
        penalty = float(how.removeprefix("beam4_lp"))
        ids, scores = generate_beams(
            *arguments, max_new_tokens=14, length_penalty=penalty, **SPECIAL
        )
        wanted = torch.tensor([case["sequences_scores"][0] for case in expected])
        torch.testing.assert_close(scores, wanted, **close)
    alone = [c["sequences"][0][len(p) :] for c, p in zip(expected, prompts, strict=True)]
    for row, one, other in zip(words(ids.tolist()), words(alone), left, strict=True):
        assert row[: len(one)] == one  # some were asked for fewer words
        assert words([other[mask.shape[1] :]])[0] == row


@pytest.mark.parametrize("name", ["git_orig_caption", "git_orig_video3", "git_orig_vqa"])
def test_beams_of_the_original(name: str) -> None:
    golden = Golden.load(name)
    model = golden.model(0.1)
    image_tokens, decoder = golden.encode(model), model.objectives["caption"].decoder
    for row, case in enumerate(golden.info["beam_single"]):
        prompt = case.get("prefix", [1])
        ids, scores = generate_beams(
            decoder,
            image_tokens[row : row + 1],
            Prompt.of([prompt], 0, "cpu"),
            max_new_tokens=golden.info["beam"]["max_steps"] - len(prompt),
            length_penalty=0.6,
            normalisation="original",
            **SPECIAL,
        )
        whole = case.get("predictions_without_prefix") or case["predictions"][0][1:]
        assert words(ids.tolist()) == words([whole])
        torch.testing.assert_close(scores, torch.tensor(case["logprob"]), **close)


def test_batches_of_the_originals_beams() -> None:
    for name in ("git_orig_caption", "git_orig_video3"):
        golden = Golden.load(name)
        model, expected = golden.model(0.1), golden.info["beam_batch"]
        image_tokens = golden.encode(model)
        ids, scores = generate_beams(
            model.objectives["caption"].decoder,
            image_tokens,
            Prompt.of_bos(len(image_tokens), 1, image_tokens.device),
            max_new_tokens=15,
            length_penalty=0.6,
            normalisation="original",
            **SPECIAL,
        )
        assert words(ids.tolist()) == words(row[1:] for row in expected["predictions"])
        torch.testing.assert_close(scores, torch.tensor(expected["logprobs"]), **close)


def test_a_trie_of_the_original() -> None:
    """Its ids; and scores that are log-probabilities, which the original's are not."""
    golden = Golden.load("git_orig_caption")
    model, expected = golden.model(0.1), golden.info["trie"]
    image_tokens, decoder = golden.encode(model), model.objectives["caption"].decoder
    trie = Trie.build(expected["names"], 97, 2)
    prompt = Prompt.of_bos(len(image_tokens), 1, image_tokens.device)
    ids, scores = generate_words(
        decoder, image_tokens, prompt, trie=trie, repeats=False, max_new_tokens=8, **SPECIAL
    )
    wanted = [case["predictions"] for case in expected["results"]]
    assert [[1, *row] for row in words(ids.tolist())] == wanted
    for row, text in enumerate(wanted):
        tokens = torch.tensor([[text[:-1]]])
        logits = decoder(image_tokens[row : row + 1], tokens, torch.arange(len(text) - 1))
        by_word = logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])
        torch.testing.assert_close(scores[row], by_word.sum(), **close)
