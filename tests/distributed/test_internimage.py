"""InternImage on two ranks, with drop path, recomputation and both heads, against one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.internimage_worker import (
    BATCH,
    HEADS,
    SGD,
    STAGES,
    STEPS,
    batch_of,
    build_model,
    start,
)
from tests.distributed.launch import run_ranks, tails

WORLD = 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    out = tmp_path_factory.mktemp("internimage")
    codes = run_ranks("tests.distributed.internimage_worker", [out], WORLD, out)
    assert codes == [0] * WORLD, tails(out)
    return out, json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module", params=HEADS)
def plain(request):
    """One process with the undivided batch: losses, first gradients, and buffers at the end."""
    torch.set_num_threads(1)
    model = start(build_model(request.param)).train()
    optimizer = torch.optim.SGD(model.parameters(), SGD.lr)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model("classify", batch_of(step), {"images": BATCH, "labels": BATCH})["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return request.param, losses, gradients, dict(model.named_buffers())


@pytest.mark.parametrize("stage", STAGES)
def test_losses_gradients_and_statistics(launched, plain, stage):
    out, found_losses = launched
    head, losses, gradients, buffers = plain
    assert found_losses[f"zero{stage}_{head}"] == pytest.approx(losses, rel=1e-5)
    found = load_file(out / f"zero{stage}_{head}.safetensors")
    assert found.keys() == gradients.keys() | buffers.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name].view_as(gradient), gradient, atol=1e-6, rtol=1e-4, msg=name
        )
    for name, buffer in buffers.items():
        torch.testing.assert_close(found[name], buffer.float(), atol=1e-6, rtol=1e-5, msg=name)
    assert bool(buffers) == (head == "conv")
