"""ZeRO 1, 2, 3 on one and two ranks against plain PyTorch on one process with the full batch.

Worlds run in one launch each, for start-up is what costs. Under AdamW, parameters whose true
gradient is zero (and so is rounding under ZeRO) would be compared as noise; there are none here:
the never-used layer has gradient exactly zero everywhere, and decays alike.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.zero import make_optimizer
from pretrain.models.init import initialise
from pretrain.optim.groups import parameter_groups
from tests.distributed.launch import run_ranks, tails
from tests.distributed.toy import toy_batch, toy_model
from tests.distributed.zero_worker import OPTIMIZERS, SEED, STEPS, cell_name, cells


@pytest.fixture(scope="module", params=[1, 2], ids=["world1", "world2"])
def launched(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"zero_world{request.param}")
    codes = run_ranks("tests.distributed.zero_worker", [out], request.param, out)
    assert codes == [0] * request.param, tails(out)
    return out, json.loads((out / "cells.json").read_text())


def plain_run(optimizer: str) -> tuple[list, list, list[dict], dict]:
    """The reference: no DeepSpeed; a missing gradient counts as zero, as ZeRO has it."""
    settings = OPTIMIZERS[optimizer]
    model = toy_model()
    initialise(model, SEED)
    groups = parameter_groups(model, settings)
    torch_optimizer = make_optimizer(groups, settings)
    names = {id(p): n for n, p in model.named_parameters()}
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        batch = toy_batch(step)
        totals = {"images": batch["valid"].sum().float()}
        loss = model("words", batch, totals)["loss"]
        torch_optimizer.zero_grad()
        loss.backward()
        trained = [p for group in groups for p in group["params"]]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, settings.clip_norm, norm)
        gradients.append({names[id(p)]: p.grad.flatten().clone() for p in trained})
        torch_optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, gradients, {n: p.detach().flatten() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def references():
    torch.set_num_threads(1)
    return {name: plain_run(name) for name in OPTIMIZERS}


FP32 = [cell for cell in cells() if cell[1] == "fp32"]


@pytest.mark.parametrize("cell", FP32, ids=lambda cell: cell_name(*cell))
def test_fp32_equals_plain_pytorch(launched, references, cell):
    out, results = launched
    tensors = load_file(out / f"{cell_name(*cell)}.safetensors")
    losses, norms, gradients, weights = references[cell[2]]
    mine = results[cell_name(*cell)]
    torch.testing.assert_close(mine["losses"], losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine["norms"], norms, rtol=1e-5, atol=1e-6)
    for step in (0, 1, STEPS - 1):
        for name, gradient in gradients[step].items():
            torch.testing.assert_close(
                tensors[f"gradient{step}.{name}"], gradient, rtol=1e-5, atol=1e-6,
                msg=lambda m, where=f"gradient of {name} at step {step}": f"{where}: {m}",
            )
    tolerance = 1e-6 if cell[2] == "sgd" else 1e-4
    ended = {n.removeprefix("end."): t for n, t in tensors.items() if n.startswith("end.")}
    assert set(ended) == {n for n in weights if ".frozen." not in n}
    for name, weight in ended.items():
        torch.testing.assert_close(weight, weights[name], rtol=tolerance, atol=tolerance)


def test_bf16_stages_agree(launched):
    _, results = launched
    runs = [results[cell_name(stage, "bf16", "adamw", 1)]["losses"] for stage in (1, 2, 3)]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-3, atol=0)


def test_weights_move(references):
    """The comparison above is not one of models that stand still."""
    for _, norms, _, weights in references.values():
        start = toy_model()
        initialise(start, SEED)
        moved = max((weights[n] - p.detach().flatten()).abs().max()
                    for n, p in start.named_parameters())
        assert moved > 0.05
        assert min(norms) > 1e-3
