"""What must hold of the model whatever its weights are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.git.decoder import GitDecoderSettings, caption_mask
from pretrain.models.git.generation import generate_greedy
from pretrain.models.vit import PatchEmbedding, VitSettings, quick_gelu
from tests.pretrain.models.git.git_models import (
    Golden,
    loss_and_gradients,
    small_batch,
    small_model,
)


def assert_same(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def test_captions_of_one_image_share_its_stream() -> None:
    model, batch = small_model(), small_batch(images=3, captions=4)
    repeated = dict(batch)
    repeated["images"] = batch["images"].repeat_interleave(4, dim=0)
    repeated["tokens"] = batch["tokens"].flatten(0, 1)[:, None]
    repeated["loss_mask"] = batch["loss_mask"].flatten(0, 1)[:, None]
    repeated["valid"] = torch.ones(12, dtype=torch.bool)
    shared, gradients = loss_and_gradients(model, batch)
    alone, gradients_alone = loss_and_gradients(model, repeated)
    assert_same(shared, alone, atol=1e-6, rtol=1e-6)
    assert_same(gradients, gradients_alone, atol=1e-6, rtol=1e-5)


def test_mask_keeps_captions_apart() -> None:
    mask = caption_mask(captions=2, length=2, image_length=3, device=torch.device("cpu"))
    expected = [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(dropout: float) -> None:
    results = []
    for checkpointing in (False, True):
        model = small_model(dropout=dropout, gradient_checkpointing=checkpointing)
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, small_batch()))
    assert_same(results[0][0], results[1][0], atol=0, rtol=0)
    assert_same(results[0][1], results[1][1], atol=0, rtol=0)


def test_dropout_only_in_training() -> None:
    model, batch = small_model(dropout=0.3), small_batch()
    first, second = (loss_and_gradients(model, batch)[0]["loss"] for _ in range(2))
    assert first != second
    model.eval()
    first, second = (loss_and_gradients(model, batch)[0]["loss"] for _ in range(2))
    plain = loss_and_gradients(small_model(dropout=0.0), batch)[0]["loss"]
    assert first == second == plain


def test_cached_greedy_equals_recomputing() -> None:
    # Golden weights, since with initial ones every image gets the same words.
    model = Golden.load("git_caption").model(0.1)
    decoder, ids = model.objectives["caption"].decoder, {"bos_id": 1, "eos_id": 2, "pad_id": 0}
    torch.manual_seed(0)
    image_tokens = model.encoders["image"](torch.randn(5, 3, 32, 32)).detach()
    cached = generate_greedy(decoder, image_tokens, **ids, max_new_tokens=10)
    assert len({tuple(row) for row in cached.tolist()}) > 1
    tokens = torch.ones(5, 1, 1, dtype=torch.int64)
    ended = torch.zeros(5, dtype=torch.bool)
    for _ in range(cached.shape[1] - 1):
        last = torch.arange(5) * tokens.shape[2] + tokens.shape[2] - 1
        best = decoder(image_tokens, tokens, last).argmax(-1)
        best[ended] = 0
        ended |= best == 2
        tokens = torch.cat([tokens, best[:, None, None]], dim=2)
    assert cached.tolist() == tokens[:, 0].tolist()


def test_generation_pads_ended_rows_and_stops_when_told() -> None:
    model = Golden.load("git_caption").model(0.1)
    decoder, ids = model.objectives["caption"].decoder, {"bos_id": 1, "eos_id": -1, "pad_id": 0}
    torch.manual_seed(0)
    image_tokens = model.encoders["image"](torch.randn(8, 3, 32, 32)).detach()
    free = generate_greedy(decoder, image_tokens, **ids, max_new_tokens=6)
    # Without an end word rows run on; then the first row's second word becomes the end word.
    ids["eos_id"] = int(free[0, 2])
    answers = []
    stopped = generate_greedy(
        decoder,
        image_tokens,
        **ids,
        max_new_tokens=6,
        agree=lambda done: answers.append(done) or len(answers) == 5,
    )
    assert stopped.shape == (8, 6)
    assert len(answers) == 5
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        words = whole[1:6]
        kept = words[: words.index(ids["eos_id"]) + 1] if ids["eos_id"] in words else words
        assert row == [1, *kept, *[0] * (5 - len(kept))]


def test_generation_ends_early_on_one_process() -> None:
    model = small_model()
    decoder = model.objectives["caption"].decoder
    image_tokens = model.encoders["image"](torch.randn(2, 3, 16, 16)).detach()
    decoder.output.bias.data[2] = 1e4
    ids = generate_greedy(decoder, image_tokens, bos_id=1, eos_id=2, pad_id=0, max_new_tokens=10)
    assert ids.tolist() == [[1, 2], [1, 2]]


def test_text_must_fit_the_position_table() -> None:
    model = small_model(max_positions=12)
    with pytest.raises(ValueError, match="max_positions 12"):
        loss_and_gradients(model, small_batch(length=16))
    image_tokens = torch.zeros(1, 5, 32)
    with pytest.raises(ValueError, match="together at most 13"):
        generate_greedy(
            model.objectives["caption"].decoder,
            image_tokens,
            bos_id=1,
            eos_id=2,
            pad_id=0,
            max_new_tokens=13,
        )


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_graph_under_compile(tied: bool) -> None:
    model, batch = small_model(tied_output=tied), small_batch()
    encoder, decoder = model.encoders["image"], model.objectives["caption"].decoder
    images, positions = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 9])
    expected = decoder(encoder(images), batch["tokens"], positions)
    expected.sum().backward()
    gradient = encoder.embedding.positions.grad.clone()
    encoder.zero_grad()
    torch._dynamo.reset()
    compiled = [torch.compile(m, fullgraph=True, backend="aot_eager") for m in (encoder, decoder)]
    found = compiled[1](compiled[0](images), batch["tokens"], positions)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoder.embedding.positions.grad, gradient)


def test_bfloat16_follows_float32() -> None:
    batch = small_batch()
    exact, gradients = loss_and_gradients(small_model(), batch)
    rough, rough_gradients = loss_and_gradients(small_model().to(torch.bfloat16), batch)
    assert rough["loss"].dtype == torch.float32
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-2)
    norm = lambda grads: torch.cat([g.float().flatten() for g in grads.values()]).norm()  # noqa: E731
    assert float(norm(rough_gradients)) == pytest.approx(float(norm(gradients)), rel=0.05)


def test_other_image_sizes_and_too_small_ones() -> None:
    encoder = small_model().encoders["image"]
    assert encoder(torch.randn(1, 3, 24, 41)).shape == (1, encoder.tokens(24, 41), 32)
    assert encoder.tokens(24, 41) == 1 + 3 * 5
    with pytest.raises(ValueError, match="holds no patch"):
        encoder(torch.randn(1, 3, 7, 16))


@pytest.mark.parametrize("grid", [(5, 3), (2, 9), (4, 1), (1, 4)])
def test_positions_of_other_sizes_are_bicubic(grid: tuple[int, int]) -> None:
    """And so is their gradient."""
    vit = VitSettings(image_size=16, patch_size=4, width=6, layers=1, heads=2).build()
    embedding = vit.embedding
    torch.nn.init.normal_(embedding.positions)
    table = embedding.positions[1:].detach().clone().requires_grad_()
    maps = table.T.reshape(1, 6, 4, 4)
    wanted = F.interpolate(maps, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    found = embedding._positions_for(*grid)
    assert torch.equal(found[0], embedding.positions[0])
    torch.testing.assert_close(found[1:], wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(wanted)
    wanted.backward(upstream), found[1:].backward(upstream)
    torch.testing.assert_close(embedding.positions.grad[1:], table.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_positions_do_not_depend_on_the_default_type(default: torch.dtype, request) -> None:
    embedding = PatchEmbedding(16, 4, 6, 1.0)
    torch.nn.init.normal_(embedding.positions)
    wanted = embedding._positions_for(5, 3)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(default)
    assert torch.equal(embedding._positions_for(5, 3), wanted)


def test_quick_gelu() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize("captions", [1, 3])
def test_flops_are_those_that_torch_counts(captions: int) -> None:
    model, batch = small_model(), small_batch(captions=captions)
    objective = model.objectives["caption"]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model("caption", "undivided", batch, {"tokens": 1.0})
    # Scores between captions are computed and masked; they are no work that the model asks for.
    images, width, layers, length = 3, 24, 3, 7
    masked = images * layers * 4 * width * captions * (captions - 1) * length**2
    assert objective.flops(batch) == 3 * (counter.get_total_flops() - masked)


def test_flops_leave_padding_rows_out() -> None:
    objective, batch = small_model().objectives["caption"], small_batch(images=4)
    full = objective.flops(batch)
    batch["valid"] = torch.tensor([True, True, False, False])
    batch["loss_mask"][2:] = False
    assert objective.flops(batch) < 0.6 * full
    batch["valid"] = torch.zeros(4, dtype=torch.bool)
    assert objective.flops(batch) == 0


def test_model_is_independent_of_its_copy() -> None:
    model = small_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoders["image"].norm_after.weight.add_(1)
    assert model.encoders["image"].norm_after.weight[0].item() == 1.0
    output = other.objectives["caption"].decoder
    assert output.output.weight is output.embedding.words.weight


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (VitSettings, {"heads": 5}, "heads .5. must divide width"),
        (VitSettings, {"image_size": 225}, "must divide image_size"),
        (GitDecoderSettings, {"heads": 7}, "must divide width"),
        (GitDecoderSettings, {"dropout": 1.0}, "dropout"),
        (GitDecoderSettings, {"depth": 6}, "depth"),
    ],
)
def test_impossible_settings(kind: type, values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**values)
