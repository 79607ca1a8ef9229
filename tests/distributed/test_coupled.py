"""Contrastive steps, divided in every way, against one process with the undivided batch.

Ten samples on 1, 2 and 3 ranks in micro-batches of 10, 4, 2 and 1: worlds that do not divide get
padding rows. Gradients to 1e-6, weights under SGD after three steps too. The same of features that
belong to no sample (`shared_model`), with overlap and offload, which have lost such gradients.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from pretrain.models.init import initialise
from tests.distributed import shared_model
from tests.distributed.coupled_worker import (
    GLOBAL_BATCH,
    MICRO_BATCHES,
    SEED,
    SGD,
    SHARED_CELLS,
    STEPS,
    cell_name,
)
from tests.distributed.launch import run_ranks, tails
from tests.pretrain.objectives.pair_models import build_pair_model, gradients, pair_batch, rows_of
from tests.pretrain.objectives.unified import unified_models


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)],
    ids=lambda world: f"world{world}",
)
def launched(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"coupled_world{request.param}")
    codes = run_ranks("tests.distributed.coupled_worker", [out], request.param, out)
    assert codes == [0] * request.param, tails(out)
    return request.param, out, json.loads((out / "cells.json").read_text())


def plain_steps(dropout: float, micro_batch: int):
    """The reference: all features of a batch with their graph, one loss, one backward pass.

    With dropout each micro-batch is encoded by itself, so that it draws what a micro-step draws.
    """
    torch.set_num_threads(1)
    model = build_pair_model(dropout)
    initialise(model, SEED)
    objective, optimizer = model.objectives["contrast"], torch.optim.SGD(model.parameters(), SGD.lr)
    found = []
    for step in range(STEPS):
        batch = pair_batch(GLOBAL_BATCH, seed=step)
        totals = {"pairs": GLOBAL_BATCH}
        torch.manual_seed(100 * step)
        parts = [
            model(
                "contrast", "features", rows_of(batch, range(s, min(s + micro_batch, GLOBAL_BATCH)))
            )
            for s in range(0, GLOBAL_BATCH, micro_batch)
        ]
        features = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        targets, shared = model("contrast", "targets", batch), model("contrast", "shared")
        metrics = objective.loss(features, targets, shared, totals)
        optimizer.zero_grad()
        metrics["loss"].backward()
        found.append(({k: v.item() for k, v in metrics.items()}, gradients(model)))
        optimizer.step()
    return found, {n: p.detach().flatten() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference():
    return plain_steps(0.0, GLOBAL_BATCH)


def compare(out, results, cell, reference):
    steps, weights = reference
    tensors = load_file(out / f"{cell_name(*cell)}.safetensors")
    for step, (metrics, wanted) in enumerate(steps):
        assert results[cell_name(*cell)]["metrics"][step] == pytest.approx(metrics, abs=1e-6)
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                tensors[f"gradient{step}.{name}"],
                gradient.flatten(),
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, where=f"gradient of {name} at step {step}": f"{where}: {m}",
            )
    for name, weight in weights.items():
        torch.testing.assert_close(tensors[f"end.{name}"], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_gradients_equal_the_undivided_batch(launched, reference, stage, micro_batch):
    _, out, results = launched
    compare(out, results, (stage, micro_batch, 0.0), reference)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dropout_is_replayed_bit_for_bit(launched, stage):
    world, out, results = launched
    exact = results[cell_name(stage, 2, 0.4)]["exact"]
    assert exact == [[True] * STEPS] * world
    if world == 1:
        compare(out, results, (stage, 2, 0.4), plain_steps(0.4, 2))


def test_one_micro_step_has_no_second_pass(launched):
    """Undivided on every rank: what is seen is the loss, once."""
    world, _, results = launched
    assert results[cell_name(2, 10, 0.0)]["exact"] == [[None] * STEPS] * world


def test_the_comparison_has_teeth(reference):
    """Gradients are far above the tolerance, the temperature's too; dropout does something."""
    steps, _ = reference
    for _, grads in steps:
        assert grads["objectives.contrast.temperature.log_scale"].abs() > 1e-3
        assert all(g.abs().max() > 1e-5 for n, g in grads.items() if not n.endswith("qkv.bias"))
    dropped, _ = plain_steps(0.4, 2)
    assert abs(dropped[0][0]["loss"] - steps[0][0]["loss"]) > 1e-3


# ---- features that belong to no sample -----------------------------------------------------------


@pytest.fixture(scope="module")
def shared_reference():
    return shared_model.plain_run()


@pytest.fixture(scope="module")
def unified_reference():
    return unified_models.plain_run()


@pytest.mark.parametrize("cell", SHARED_CELLS, ids=lambda cell: cell.name)
def test_shared_features_get_their_whole_gradient(
    launched, shared_reference, unified_reference, cell
):
    """Encoded once a step, read by all micro-steps: gradients relative to the largest of a step.
    The unified tasks too, with noise on the choice of their experts."""
    reference = unified_reference if cell.model == "unified" else shared_reference
    _, out, _ = launched
    found = load_file(out / f"{cell.name}.safetensors")
    assert found.keys() == reference.keys()
    for step in range(len(cell.tasks.TASKS)):
        names = [name for name in found if name.startswith(f"gradient{step}.")]
        wanted = torch.cat([reference[name] for name in names])
        error = torch.cat([found[name] for name in names]) - wanted
        # Behind the first step there is also the rounding of the weights.
        tolerance = (3e-6 if step else 1e-6) * (5 if cell.model == "unified" else 1)
        assert error.norm() <= tolerance * wanted.norm()
        for name in names:
            own = reference[name].norm()
            error = (found[name] - reference[name]).norm()
            assert error <= 2 * tolerance * own + 1e-6, name
    for name in (name for name in found if name.startswith(("end.", "loss"))):
        torch.testing.assert_close(found[name], reference[name], rtol=1e-5, atol=1e-6)


def test_the_shared_comparison_has_teeth(shared_reference):
    """Names, temperature and bias have a gradient far above the tolerance, draws have a part."""
    for step, task in enumerate(shared_model.TASKS[:3]):
        for name in (
            f"objectives.{task}.temperature.log_scale",
            f"objectives.{task}.bias",
            "encoders.text.words.weight",
            "encoders.decoder.up.weight",
        ):
            assert shared_reference[f"gradient{step}.{name}"].abs().max() > 1e-3, (step, name)
    model, batch = shared_model.build(), shared_model.whole_batch(0)
    initialise(model, SEED)
    names = [model("classify", "shared", step=step)["names"] for step in (0, 0, 1)]
    assert torch.equal(names[0], names[1]) and (names[0] - names[2]).abs().max() > 1e-2
    losses = [
        model(
            "classify",
            "losses_in_pass",
            batch,
            shared_model.totals_of(0),
            model("classify", "shared"),
            0,
            None,
            step=step,
        )["loss"]
        for step in (0, 1)
    ]
    assert abs(losses[0] - losses[1]) > 1e-2
