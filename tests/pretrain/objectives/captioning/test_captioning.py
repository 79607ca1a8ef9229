"""The captioning objective: shares, empty batches, transformers as an oracle, evaluation."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluator import Evaluator
from pretrain.models.build_context import BuildContext
from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.git.weights import export_git
from pretrain.models.pixels import normalise_pixels
from pretrain.models.vit import VitSettings
from pretrain.objectives.captioning.captioning import CaptioningSettings
from pretrain.objectives.captioning.metrics import caption_scores
from pretrain.objectives.objective import EvaluationContext
from tests.pretrain.models.git.git_models import (
    MEAN,
    STD,
    Words,
    build,
    clips_of,
    initialise,
    loss_and_gradients,
    small_batch,
    small_model,
)
from tools.convert.transformers_git import SpecialIds, transformers_model


def rows_of(batch: dict, rows: slice) -> dict:
    return {key: value[rows] for key, value in batch.items()}


def test_shares_sum_to_the_whole() -> None:
    model, batch = small_model(), small_batch(images=5)
    objective = model.objectives["caption"]
    whole, gradients = loss_and_gradients(model, batch)
    total = objective.counts(batch)["tokens"]
    assert total == int(batch["loss_mask"].sum())
    # Uneven parts: 1 image and 4, with different numbers of words.
    parts = [rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 5))]
    assert sum(objective.counts(part)["tokens"] for part in parts) == total
    shares = [loss_and_gradients(model, part, total) for part in parts]
    for key in whole:
        assert sum(s[0][key].item() for s in shares) == pytest.approx(whole[key].item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(s[1][name] for s in shares), gradient, atol=1e-6, rtol=1e-4)


def test_totals_may_be_tensors() -> None:
    model, batch = small_model(), small_batch()
    number = loss_and_gradients(model, batch, 20)[0]["loss"]
    tensor = loss_and_gradients(model, batch, torch.tensor(20))[0]["loss"]
    assert number == tensor


@pytest.mark.parametrize("supervised", [True, False])
def test_counts_that_the_host_knows_change_nothing(supervised: bool) -> None:
    model, batch = small_model(), small_batch()
    batch["loss_mask"][0] = False
    batch["loss_mask"] &= supervised
    asked, gradients = loss_and_gradients(model, batch, 20)
    batch |= model.objectives["caption"].prepare(batch)
    assert len(batch["supervised"]) == batch["loss_mask"][..., 1:].sum()
    known, same = loss_and_gradients(model, batch, 20)
    assert asked.keys() == known.keys() and gradients.keys() == same.keys()
    assert all(torch.equal(asked[name], known[name]) for name in asked)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_padding_rows_and_tokens_have_no_influence() -> None:
    model, batch = small_model(), small_batch(images=4)
    batch["loss_mask"][2:] = False
    batch["valid"] = torch.tensor([True, True, False, False])
    padded, gradients = loss_and_gradients(model, batch)
    alone, gradients_alone = loss_and_gradients(model, rows_of(batch, slice(0, 2)))
    assert model.objectives["caption"].counts(batch)["images"] == 2
    assert padded["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], atol=1e-7, rtol=1e-4)
    # Other pixels, and other words behind each caption's end, change nothing at all.
    noisy = {key: value.clone() for key, value in batch.items() if torch.is_tensor(value)}
    noisy["images"][2:] = 255 - noisy["images"][2:]
    behind = ~noisy["loss_mask"]
    behind[..., 0] = False
    noisy["tokens"][behind] = 55
    other, gradients_other = loss_and_gradients(model, noisy)
    assert other["loss"] == padded["loss"]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_other[name], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("total", [0, 17])
def test_a_batch_without_captions_runs_all_heads(total: int) -> None:
    model, batch = small_model(), small_batch()
    batch["loss_mask"][:] = False
    out, gradients = loss_and_gradients(model, batch, total)
    assert all(value.item() == 0 for value in out.values())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_pixels_are_normalised_in_float32() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = (images / 255.0 - mean) / std
    torch.testing.assert_close(normalise_pixels(images, MEAN, STD, torch.float32), expected)
    assert torch.equal(
        normalise_pixels(images, MEAN, STD, torch.bfloat16),
        normalise_pixels(images, MEAN, STD, torch.float32).bfloat16(),
    )
    with pytest.raises(TypeError, match="uint8"):
        normalise_pixels(images.float(), MEAN, STD, torch.float32)


def test_settings_name_what_does_not_fit() -> None:
    encoders = {"image": VitSettings(image_size=16, patch_size=8, width=32, heads=4).build()}
    with pytest.raises(ValueError, match=r"encoder 'picture' is not in model\.encoders \(image\)"):
        CaptioningSettings(encoder="picture").build(BuildContext(encoders, Words(), MEAN, STD))
    short = CaptioningSettings(decoder=GitDecoderSettings(max_positions=30))
    with pytest.raises(ValueError, match=r"max_new_tokens \(40\) exceeds"):
        short.build(BuildContext(encoders, Words(), MEAN, STD))


# ------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_transformers(seed: int) -> None:
    """Loss, gradients, logits and greedy words on shapes that are not the golden ones."""
    pick = torch.Generator().manual_seed(seed)
    choose = lambda *options: options[int(torch.randint(len(options), (1,), generator=pick))]  # noqa: E731
    heads = choose(1, 2, 3)
    vit = VitSettings(
        image_size=choose(12, 24),
        patch_size=choose(4, 6),
        width=heads * choose(8, 12),
        layers=choose(1, 3),
        heads=heads,
        mlp_ratio=choose(2.0, 3.0),
        activation=choose("gelu", "quick_gelu"),
    )
    decoder = GitDecoderSettings(
        width=heads * choose(8, 16),
        layers=choose(1, 2, 4),
        heads=heads,
        mlp_width=choose(20, 64),
        max_positions=16,
        dropout=0.0,
        tied_output=choose(True, False),
        embedding_norm_eps=1e-12,
    )
    model = build(vit, decoder, Words(), label_smoothing=0.0)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=pick) * 0.1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    twin = transformers_model(weights, vit, decoder, SpecialIds(1, 2, 0)).train()
    batch = small_batch(seed, captions=2, size=vit.image_size)
    out, gradients = loss_and_gradients(model, batch)

    pixels = normalise_pixels(batch["images"], MEAN, STD, torch.float32)
    tokens, mask = (batch[key].flatten(0, 1) for key in ("tokens", "loss_mask"))
    theirs = twin(
        pixel_values=pixels.repeat_interleave(2, dim=0),
        input_ids=tokens,
        attention_mask=((tokens != 0) | mask).long(),
        labels=tokens.masked_fill(~mask, -100),
        use_cache=False,
    )
    theirs.loss.backward()
    assert out["loss"].item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    assert out["cross_entropy"].item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    image_part = theirs.logits.shape[1] - tokens.shape[1]
    guesses = theirs.logits[:, image_part:-1].argmax(-1)[mask[:, 1:]]
    hits = (guesses == tokens[:, 1:][mask[:, 1:]]).float().mean()
    assert out["token_accuracy"].item() == pytest.approx(hits.item(), abs=1e-6)
    foreign = export_git(gradients, "transformers")
    for name, parameter in twin.named_parameters():
        if not name.endswith("word_embeddings.weight"):  # pad's row is frozen there
            torch.testing.assert_close(parameter.grad, foreign[name], atol=1e-5, rtol=1e-3)

    ids = model.objectives["caption"].generate(model.encoders, batch["images"], 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = twin.eval().generate(pixel_values=pixels, max_new_tokens=8, do_sample=False)
    assert F.pad(ids, (0, expected.shape[1] - ids.shape[1])).tolist() == expected.tolist()


# -------------------------------------------------------------------------------- evaluation


def talking_model(**changes):
    """Initial weights say the same to every image; these do not."""
    model, noise = small_model(**changes), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
    return model


def evaluation_batches(images: int, size: int) -> list[dict]:
    """Batches of `size` rows; the last is filled up with rows that do not count."""
    batches = []
    for start in range(0, images, size):
        batch = small_batch(start, images=size, captions=1)
        batch["row"] = torch.arange(start, start + size)
        batch["valid"] = batch["row"] < images
        batch["loss_mask"] &= batch["valid"][:, None, None]
        batch["key"] = [f"key{row}" for row in batch["row"].tolist()]
        batch["captions"] = [[f"w{row + 3} w4", "w4 w5 w6"] for row in batch["row"].tolist()]
        batches.append(batch)
    return batches


def evaluate(model, batches, reduce=lambda value: [value], **options):
    objective, device = model.objectives["caption"], torch.device("cpu")
    context = EvaluationContext(device, Words(), reduce, **options)
    return objective.evaluate(model.encoders, batches, context)


def test_clips_are_images_whose_tokens_stand_side_by_side() -> None:
    model, batch = small_model(frames=4), small_batch()
    objective, clips = model.objectives["caption"], clips_of(batch, 3)
    vectors = objective.decoder.temporal.vectors
    assert not vectors.any()  # from there on it learns what the places are
    with torch.no_grad():
        vectors.normal_(generator=torch.Generator().manual_seed(1))
    out, gradients = loss_and_gradients(model, clips)
    pixels = normalise_pixels(clips["images"].flatten(0, 1), MEAN, STD, torch.float32)
    tokens = model.encoders["image"](pixels).unflatten(0, (3, 3))
    tokens = torch.cat([tokens[:, frame] + vectors[frame] for frame in range(3)], dim=1)
    loss, _, _ = objective.token_sums(tokens, batch)
    assert out["loss"].item() == pytest.approx(loss.item() / objective.counts(batch)["tokens"])
    of_vectors = gradients["objectives.caption.decoder.temporal.vectors"]
    assert of_vectors[:3].abs().amin(dim=(1, 2)).gt(0).all() and not of_vectors[3].any()
    # Their order counts, and single images are still read, without the vectors.
    turned = clips | {"images": clips["images"].flip(1)}
    assert loss_and_gradients(model, turned)[0]["loss"] != out["loss"]
    plain = small_model()
    plain.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "temporal" not in name}
    )
    assert torch.equal(
        objective.generate(model.encoders, batch["images"]),
        plain.objectives["caption"].generate(plain.encoders, batch["images"]),
    )
    with pytest.raises(ValueError, match=r"a clip of 5 frames, but decoder\.frames is 4"):
        objective.generate(model.encoders, clips_of(batch, 5)["images"])
    with pytest.raises(ValueError, match=r"set decoder\.frames"):
        plain.objectives["caption"].generate(plain.encoders, clips["images"])


def test_the_work_of_a_clip_is_that_of_its_frames() -> None:
    model, batch = small_model(frames=4), small_batch()
    objective = model.objectives["caption"]
    encoder, decoder = model.encoders["image"], objective.decoder
    scored = objective.counts(batch)["tokens"] / 3
    expected = 4 * encoder.flops(16, 16) + decoder.flops(4 * 5, 32, 2, 7, scored)
    assert objective.flops(clips_of(batch, 4)) == 3 * 3 * expected


def test_evaluation_of_clips() -> None:
    model, batch = small_model(frames=2), clips_of(small_batch(), 2)
    batch["captions"] = [["w5 w6"], ["w7"], ["w8 w9"]]
    objective = model.objectives["caption"]
    values, examples = objective.evaluate(
        model.encoders, [batch], EvaluationContext(torch.device("cpu"), Words(), keep_images=2)
    )
    assert values["images"] == 3 and values["loss"] == pytest.approx(
        loss_and_gradients(model, batch)[0]["loss"].item(), rel=1e-5
    )
    first, second, third = (example.image for example in examples)
    assert torch.equal(first, torch.cat([batch["images"][0, 0], batch["images"][0, 1]], dim=2))
    assert second.shape == (3, 16, 32) and third is None


def test_examples_draw_themselves_for_tensorboard() -> None:
    """Those of any objective: the evaluator knows a picture and a text, and no caption."""
    model, batches = talking_model(), evaluation_batches(7, 4)
    _, examples = evaluate(model, batches, keep_images=2)
    seen: list = []
    evaluator = SimpleNamespace(metrics=SimpleNamespace(images=lambda *found: seen.extend(found)))
    Evaluator._show(evaluator, 3, "caption", examples)
    step, task, pictures, texts = seen
    assert (step, task, len(pictures)) == (3, "caption", 2)
    for example, picture, text in zip(examples, pictures, texts, strict=False):
        assert torch.equal(torch.from_numpy(picture), example.image.permute(1, 2, 0))
        assert text == f"{example.caption}\n({example.references[0]})"


def test_evaluation_reports_every_valid_image_once() -> None:
    model, batches = talking_model(dropout=0.2), evaluation_batches(7, 4)
    metrics, examples = evaluate(model, batches, keep_images=2)
    assert [e.row for e in examples] == list(range(7))
    assert [e.key for e in examples] == [f"key{row}" for row in range(7)]
    assert [e.row for e in examples if e.image is not None] == [0, 1]
    assert torch.equal(examples[1].image, batches[0]["images"][1])
    assert metrics["images"] == 7
    assert len({e.caption for e in examples}) > 1
    scores = caption_scores([e.caption for e in examples], [e.references for e in examples])
    assert {key: metrics[key] for key in scores.means} == scores.means
    assert all(module.training for module in model.modules())
    ids = model.objectives["caption"].generate(model.encoders, batches[0]["images"])
    assert examples[0].caption == Words().decode(ids[0].tolist()) != ""
    sums = [0.0, 0.0]
    model.eval()
    for batch in batches:
        count = model.objectives["caption"].counts(batch)["tokens"]
        out, _ = loss_and_gradients(model, batch)
        sums = [sums[0] + out["cross_entropy"].item() * count, sums[1] + count]
    assert metrics["cross_entropy"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_evaluation_on_two_ranks_equals_one() -> None:
    """Both ranks run in one thread each and meet in `reduce`, as they would in a collective."""
    from threading import Barrier, Thread

    model, batches = talking_model(), evaluation_batches(7, 2)
    alone = evaluate(model, batches)
    meeting, board, results = Barrier(2, timeout=60), [None, None], [None, None]

    def run(rank: int) -> None:
        def reduce(value):
            board[rank] = value
            meeting.wait()
            values = list(board)
            meeting.wait()
            return values

        twin = talking_model()
        results[rank] = evaluate(
            twin, batches[rank::2], reduce, keep_images=0, agree=lambda done: all(reduce(done))
        )

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(alone[0], rel=1e-6)
    assert [e.caption for e in results[0][1]] == [e.caption for e in alone[1]]


def test_evaluation_without_references_gives_no_caption_scores() -> None:
    batches = evaluation_batches(4, 4)
    batches[0]["captions"] = [[] for _ in range(4)]
    metrics, examples = evaluate(talking_model(), batches)
    assert "cider_d" not in metrics and metrics["images"] == 4 and len(examples) == 4


def test_an_evaluation_writes_as_the_recipe_says() -> None:
    """Beams find likelier captions than the likeliest word each time; settings of another kind of
    writing are refused."""
    from pydantic import ValidationError

    from pretrain.models.git.settings import GenerationSettings

    model, batch = small_model(2, initial_std=0.3), small_batch(images=4, captions=1)
    objective, modules = model.objectives["caption"], model.encoders

    def likelihood(ids) -> float:
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in zip(mask, ids.tolist(), strict=True):
            row[1 : text.index(2) + 1 if 2 in text else len(text)] = True
        text = {"tokens": ids[:, None], "loss_mask": mask[:, None]}
        image_tokens = objective._encode(modules, batch["images"])
        return -float(objective.token_sums(image_tokens, text)[1].detach())

    greedy = objective.generate(modules, batch["images"])
    found = {}
    for kind in ("beam", "sample"):
        objective.way = GenerationSettings(
            kind=kind, **({"length_penalty": 0.0} if kind == "beam" else {})
        ).build()
        found[kind] = objective.generate(modules, batch["images"], rows=[3, 1, 4, 5])
        again = objective.generate(modules, batch["images"], rows=[3, 1, 4, 5])
        assert torch.equal(found[kind], again)
    assert likelihood(found["beam"]) > likelihood(greedy) > likelihood(found["sample"])
    with pytest.raises(ValidationError, match="only where kind is sample, not beam"):
        GenerationSettings(kind="beam", top_k=5)


def test_losses_of_held_out_data_without_writing_texts(monkeypatch) -> None:
    """On a clock of its own; the numbers are those of the whole evaluation."""
    from pretrain.recipe.load import RecipeError, load_recipe

    model, batches = small_model(2), evaluation_batches(5, 2)
    whole = evaluate(model, batches)
    monkeypatch.setattr(type(model.objectives["caption"]), "_generate", None)
    quick = evaluate(model, batches, write_texts=False)
    names = ["token_accuracy", "loss", "cross_entropy", "perplexity", "images"]
    assert list(quick.metrics) == names and quick.examples == []
    assert quick.metrics == {name: whole.metrics[name] for name in names}
    assert quick.metrics["images"] == 5
    assert quick.metrics["perplexity"] == pytest.approx(
        2.718281828 ** whole.metrics["cross_entropy"]
    )

    clocks = ["steps=55", "evaluation_every_steps=10", "perplexity_every_steps=4"]
    recipe = load_recipe("digits_multitask", clocks)
    evaluator = Evaluator(recipe, *[None] * 7)
    both = [name for name, task in recipe.tasks.items() if task.evaluation]
    writing = [name for name in both if recipe.tasks[name].objective.type == "captioning"]
    assert len(both) > len(writing) > 0
    due = [evaluator._due(step) for step in (3, 4, 10, 20, 28, 55)]
    assert due == [[], writing, both, both, writing, both]
    assert [evaluator._is_whole(step) for step in (4, 20, 55)] == [False, True, True]
    with pytest.raises(RecipeError, match="no task with an `evaluation` block writes texts"):
        load_recipe("internimage_t_in1k", ["perplexity_every_steps=4"])
