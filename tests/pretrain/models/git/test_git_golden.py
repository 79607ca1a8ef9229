"""Against reference values of transformers and of the original repository."""

import math

import pytest
import torch

from pretrain.models.git.generation import generate_greedy
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
)
COMPLETE = (
    "git_caption",
    "git_caption_untied",
    "git_orig_caption",
    "git_video3",
    "git_orig_video3",
)
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


@pytest.mark.parametrize("name", [*TRANSFORMERS, "git_orig_caption", "git_orig_video3"])
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


@pytest.mark.parametrize("name", COMPLETE)
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
