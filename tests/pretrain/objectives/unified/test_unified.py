"""The unified objectives: shares add up, words, masks and captions, and their evaluation."""

import math

import pytest
import torch

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.objective import EvaluationContext
from tests.pretrain.objectives.unified import unified_models as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.ready()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_micro_batches_with_padding_add_up_to_the_batch(model, step):
    task, batch, totals = tiny.TASKS[step], tiny.whole_batch(step), tiny.totals_of(step)
    shared = model(task, "shared", step=step)
    whole = model(task, "losses", batch, totals, shared, step=step)
    parts = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, -1, -1], [-1, -1]]
    found = [
        model(task, "losses", tiny.rows_of(batch, rows), totals, shared, step=step)
        for rows in parts
    ]
    assert whole["loss"] > 0.5
    for name, value in whole.items():
        total = sum(part[name] for part in found)
        torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-6)
    assert found[-1]["loss"] == 0 and found[-1]["loss"].requires_grad


@pytest.mark.parametrize("step", range(4))
def test_every_parameter_of_a_task_learns(model, step):
    """The text encoder and the decoder from inputs and targets, the family's own temperature."""
    task = tiny.TASKS[step]
    model.zero_grad()
    model(task, "undivided", tiny.whole_batch(step), tiny.totals_of(step), step=step)[
        "loss"
    ].backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    family = {"classify": "classification", "retrieve": "retrieval"}.get(task, task)
    scales = {n for n in learned if ".scales." in n}
    assert scales == {f"encoders.general.scales.{family}.log_scale"}
    for part in (
        "text.embedding.words.weight",
        "general.special.vector",
        "general.layers.0.expand.weight",
        "general.output.linear.weight",
    ):
        assert f"encoders.{part}" in learned
    assert ("encoders.general.special.positions" in learned) == (task == "caption")
    assert any(n.startswith("encoders.image.") for n in learned) == (task != "mlm")


def test_the_target_set_in_pieces_is_the_whole(model, monkeypatch):
    objective = model.objectives["caption"]
    whole = objective.shared(model.encoders, None)["targets"]
    monkeypatch.setattr("pretrain.objectives.unified.parts._PIECE", 10)
    pieces = objective.shared(model.encoders, None)["targets"]
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(tiny.WORDS))
    for targets in (whole, pieces):
        model.zero_grad()
        targets.cumsum(0).square().sum().backward()
        gradient = model.encoders["text"].embedding.words.weight.grad
        if targets is whole:
            first = gradient.clone()
    torch.testing.assert_close(gradient, first, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_writes_what_one_pass_would(model):
    """Each word is the best one after those before it, as the training's pass scores them."""
    model.eval()
    objective, batch = model.objectives["caption"], tiny.whole_batch(2)
    shared = objective.shared(model.encoders, None)
    ids = objective.generate(model.encoders, batch["images"], shared)
    model.train()
    length = ids.shape[1]
    assert length > 2 and (ids[:, 0] == tiny.BOS).all()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in ids[:, 1:]:
        ended = (row == tiny.EOS).nonzero()
        if len(ended):
            assert (row[ended[0, 0] + 1 :] == tiny.PAD).all()
    mask[:, 1:] = ids[:, 1:] != tiny.PAD
    inputs = {"images": batch["images"], "tokens": ids[:, None], "loss_mask": mask[:, None]}
    model.eval()
    _, _, right = objective.token_sums(model.encoders, inputs, shared)
    model.train()
    assert right == mask.sum()


def test_hidden_words_are_those_of_the_sample(model):
    objective, batch = model.objectives["mlm"], tiny.whole_batch(3)
    draws = SampleDraws(1, "mlm", batch["position"])
    hidden, chosen = objective.hidden(batch, draws)
    assert chosen.sum() == objective.counts(batch)["tokens"]
    assert not (chosen & ~batch["mask"]).any()
    assert torch.equal(hidden[~chosen], batch["tokens"][~chosen])
    rows = [4, 7]
    again = objective.hidden(
        tiny.rows_of(batch, rows), SampleDraws(1, "mlm", batch["position"][rows])
    )
    assert torch.equal(again[0], hidden[rows]) and torch.equal(again[1], chosen[rows])
    many = {"tokens": torch.full((4000, 10), 7), "mask": torch.ones(4000, 10, dtype=torch.bool)}
    hidden, chosen = objective.hidden(many, SampleDraws(1, "mlm", torch.arange(4000)))
    assert (chosen.sum(1) == 4).all()
    kinds = hidden[chosen]
    assert (kinds == tiny.PAD).float().mean() == pytest.approx(0.8 + 0.1 / tiny.WORDS, abs=0.01)
    assert (kinds == 7).float().mean() == pytest.approx(0.1 + 0.1 / tiny.WORDS, abs=0.01)


def test_documents_of_a_row_do_not_see_each_other(model):
    objective, batch = model.objectives["mlm"], tiny.rows_of(tiny.whole_batch(3), [0])
    batch["mask"][:], batch["documents"][:] = True, torch.tensor([0, 0, 0, 1, 1, 1, 1])
    parts, encoders = objective.parts, model.encoders

    def outputs(tokens):
        from pretrain.objectives.unified.mlm import sequence_mask

        part = parts.text_part(encoders, tokens, "masked_text", batch["mask"], batch["documents"])
        part = part._replace(mask=sequence_mask(batch["mask"], batch["documents"]))
        return encoders["general"].run([part])[0][:, 1:]

    model.eval()
    other = batch["tokens"].clone()
    other[:, 5] = (other[:, 5] + 1) % tiny.WORDS
    before, after = outputs(batch["tokens"]), outputs(other)
    model.train()
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("step", range(4))
def test_evaluation_counts_what_there_is(model, step):
    task, batch = tiny.TASKS[step], tiny.whole_batch(step)
    extra = {
        "row": batch["position"],
        "key": [str(i) for i in range(tiny.SAMPLES)],
        "captions": [["3 4", "5"]] * tiny.SAMPLES,
    }
    loader = [
        batch | extra,
        tiny.rows_of(batch, [-1, -1])
        | {"row": torch.tensor([-1, -1]), "key": ["", ""], "captions": [[], []]},
    ]
    context = EvaluationContext(torch.device("cpu"), tiny.Words())
    found = model.objectives[task].evaluate(model.encoders, loader, context).metrics
    assert model.training and found["images"] == tiny.SAMPLES
    if task == "mlm":
        assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))
    if task == "classify":
        assert found["labelled"] == 12 / 13 and found["top5"] == 1
    if task == "caption":
        assert {"cider_d", "token_accuracy"} <= {n.lower().replace("-", "_") for n in found}
    if task == "retrieve":
        assert found["image_to_text_r10"] >= found["image_to_text_r1"]
    empty = model.objectives[task].evaluate(model.encoders, loader[1:], context).metrics
    assert empty["images"] == 0 and empty.get("top1") is None
    assert empty.get("perplexity") is None


def test_labels_that_are_not_there_count_for_nothing(model):
    batch = tiny.whole_batch(0)
    batch["labels"][:] = NO_LABEL
    found = model("classify", "undivided", batch, {"images": 13, "labels": 0}, step=0)
    assert found["loss"] == 0 and found["labelled"] == 0
    found["loss"].backward()


def test_flops_count_the_places_of_maps():
    """An encoder that does not say how many tokens it makes has those of its last map."""
    from pretrain.models.backbones.settings import SwinSettings
    from pretrain.objectives.unified.parts import _tokens

    swin = SwinSettings(channels=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=4).build()
    assert _tokens(swin, 64, 65) == swin.eval()(torch.zeros(1, 3, 64, 65)).shape[1] == 6
